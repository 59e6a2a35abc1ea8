// Runs the wrappers of ptx_sm90.cuh: by nvcc on a Hopper GPU, or by g++ on the emulator.
//   golden_sm90 OUT     OUT: uint32 [2 (fp16, bf16)][13 ops][OUT]
#include <cstdio>

#include "device_memory.cuh"
#include "hopper.cuh"

int main(int argc, char** argv) {
  if (argc != 2) return fprintf(stderr, "usage: golden_sm90 OUT\n"), 2;
  FILE* output = fopen(argv[1], "wb");
  if (!output) return fprintf(stderr, "cannot open %s\n", argv[1]), 2;
  for (int type = 0; type < 2; ++type)
    for (int op = 0; op < attn::hopper::UNFENCED; ++op) {
      const auto out = attn::hopper::run({device_alloc, to_device, to_host}, op, type == 1);
      if (fwrite(out.data(), 4, out.size(), output) != out.size()) return 1;
    }
  return fclose(output);
}
