// mbarriers and tensor copies; tests/emulator/ knows what each must compute. For sm_90 and later.
#include "include/ptx.cuh"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// One thread copies boxes of `depth` x `height` x `width` elements, for which two stages of a ring wait in turn; the others
// write the shared memory out as it lies. out[box][depth * height * width].
GLOBAL void copy_boxes(const __grid_constant__ TensorMap map, const int* corners, unsigned* out, int boxes, int bytes, int rank) {
  DYNAMIC_SHARED(unsigned, stages);  // [2][bytes / 4], each 1024-byte aligned
  SHARED(uint64_t, full, [2]);
  SHARED(uint64_t, empty, [2]);
  const int words = bytes / 4, stride = (words + 255) / 256 * 256, readers = blockDim.x - 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < 2; s++) {
      mbarrier_init(&full[s], 1);
      mbarrier_init(&empty[s], readers);
    }
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    if (threadIdx.x > 0) return;
    for (int i = 0; i < boxes; i++) {
      const int s = i % 2;
      if (i >= 2) mbarrier_wait_parity(&empty[s], (i / 2 - 1) % 2);
      mbarrier_arrive_expect_tx(&full[s], bytes);
      const int* c = corners + 3 * i;
      if (rank == 2) tensor_copy_2d(stages + s * stride, &map, &full[s], c[0], c[1]);
      else tensor_copy_3d(stages + s * stride, &map, &full[s], c[0], c[1], c[2]);
    }
  } else {
    for (int i = 0; i < boxes; i++) {
      const int s = i % 2;
      mbarrier_wait_parity(&full[s], i / 2 % 2);
      for (int w = threadIdx.x - 32; w < words; w += readers) out[i * words + w] = stages[s * stride + w];
      mbarrier_arrive(&empty[s]);
    }
  }
}
KERNEL(copy_boxes, 0);

// Reads the box without waiting for it, or waits for bytes that nobody sends.
GLOBAL void box_mistakes(const __grid_constant__ TensorMap map, unsigned* out, int bytes, int expected, int wait) {
  DYNAMIC_SHARED(unsigned, box);
  SHARED(uint64_t, full, [1]);
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    mbarrier_arrive_expect_tx(full, expected);
    tensor_copy_2d(box, &map, full, 0, 0);
  }
  __syncthreads();
  if (wait) mbarrier_wait_parity(full, 0);
  out[threadIdx.x] = box[threadIdx.x % (bytes / 4)];
  __syncthreads();
  mbarrier_wait_parity(full, 0);
}
KERNEL(box_mistakes, 32);

#endif
