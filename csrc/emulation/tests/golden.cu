// Runs the wrappers kernel on records from a file: by nvcc on a GPU, or by g++ on the emulator.
//   golden IN OUT     IN: records of {int32 op, uint32 in[32][16], uint32 smem[512]}
//                     OUT: uint32 out[32][16] for each
#include <cstdio>
#include <vector>

#include "device_memory.cuh"
#include "wrappers.cuh"

using namespace attn::wrappers;

int main(int argc, char** argv) {
  struct Record {
    int32_t op;
    uint32_t in[32][WORDS], smem[SMEM_WORDS];
  } record;
  if (argc != 3) return fprintf(stderr, "usage: golden IN OUT\n"), 2;
  FILE* input = fopen(argv[1], "rb");
  FILE* output = fopen(argv[2], "wb");
  if (!input || !output) return fprintf(stderr, "cannot open %s or %s\n", argv[1], argv[2]), 2;
  auto* in = static_cast<uint32_t*>(device_alloc(sizeof(record.in)));
  auto* smem = static_cast<uint32_t*>(device_alloc(sizeof(record.smem)));
  auto* out = static_cast<uint32_t*>(device_alloc(sizeof(record.in)));
  const std::vector<uint32_t> zeros(32 * WORDS);
  while (fread(&record, sizeof(record), 1, input) == 1) {
    to_device(in, record.in, sizeof(record.in));
    to_device(smem, record.smem, sizeof(record.smem));
    to_device(out, zeros.data(), sizeof(record.in));
    attn::ptx::launch(wrappers, {1, 1, 1}, 32, SMEM_WORDS * 4, nullptr,
                      Params{record.op, in, smem, out});
    to_host(record.in, out, sizeof(record.in));
    if (fwrite(record.in, sizeof(record.in), 1, output) != 1) return 1;
  }
  return fclose(output);
}
