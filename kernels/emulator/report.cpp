#include "report.h"

#include <dlfcn.h>
#include <link.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

namespace emulator {
namespace {

// The loaded file (executable or library) that this code is part of.
struct Image {
  std::string path;
  std::uintptr_t base = 0;
  struct Segment {
    std::uintptr_t begin, end;
  };
  std::vector<Segment> segments;

  Image() { dl_iterate_phdr(visit, this); }

  static int visit(dl_phdr_info* info, std::size_t, void* to) {
    auto& image = *static_cast<Image*>(to);
    std::vector<Segment> segments;
    bool ours = false;
    for (int i = 0; i < info->dlpi_phnum; i++) {
      if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
      std::uintptr_t begin = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
      segments.push_back({begin, begin + info->dlpi_phdr[i].p_memsz});
      auto here = reinterpret_cast<std::uintptr_t>(&visit);
      ours |= begin <= here && here < segments.back().end;
    }
    if (!ours) return 0;
    image.base = info->dlpi_addr;
    image.path = *info->dlpi_name ? info->dlpi_name : "/proc/self/exe";
    image.segments = std::move(segments);
    return 1;
  }
};

const Image& image() {
  static const Image it;
  return it;
}

std::string quoted(const std::string& path) {
  std::string out = "'";
  for (char c : path) c == '\'' ? out += "'\\''" : out += c;
  return out + "'";
}

}  // namespace

// addr2line comes with the assembler that built the kernels. Of the frames inlined at a place the first one in a .cu file
// is the one that the author wrote.
std::string describe(Place place) {
  auto offset = reinterpret_cast<std::uintptr_t>(place) - image().base;
  std::string path = image().path, found;
  char resolved[4096];
  if (path == "/proc/self/exe") {  // of this process, not of the shell's child
    ssize_t n = readlink(path.c_str(), resolved, sizeof resolved - 1);
    if (n > 0) path.assign(resolved, n);
  }
  char command[64];
  std::snprintf(command, sizeof command, " -i %#zx 2>/dev/null", static_cast<std::size_t>(offset - 1));
  if (FILE* out = popen(("addr2line -e " + quoted(path) + command).c_str(), "r")) {
    char line[4096];
    while (std::fgets(line, sizeof line, out)) {
      std::string frame(line, std::strcspn(line, "\n"));
      frame = frame.substr(0, frame.find(" ("));  // a discriminator
      if (frame.rfind("??", 0) == 0 || frame.empty()) continue;
      frame = frame.substr(frame.rfind('/') + 1);
      if (found.empty()) found = frame;
      if (frame.find(".cu:") != std::string::npos) {
        found = frame;
        break;
      }
    }
    pclose(out);
  }
  if (found.empty()) append(found, "code+%#zx", static_cast<std::size_t>(offset));
  return found;
}

bool in_image(const void* address) {
  auto a = reinterpret_cast<std::uintptr_t>(address);
  for (auto& s : image().segments)
    if (s.begin <= a && a < s.end) return true;
  return false;
}

void append(std::string& text, const char* format, ...) {
  char buffer[1024];
  va_list args;
  va_start(args, format);
  std::vsnprintf(buffer, sizeof buffer, format, args);
  va_end(args);
  text += buffer;
}

}  // namespace emulator
