// The gated activation of the MLPs (Shazeer 2020, arXiv 2002.05202): silu(gate) * up, silu(x) = x sigmoid(x).
#pragma once
#include "device.cuh"

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

__device__ __forceinline__ float swiglu(float gate, float up) { return gate * sigmoid(gate) * up; }
