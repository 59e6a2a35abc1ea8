// The CPU backend's entry points: the kernels of the best ISA of this machine, or of the one that
// was asked for.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels/options.h"
#include "params.h"

namespace attn::cpu {

void forward(const Problem& p, const Pointers& ptr, int threads);
void backward(const Problem& p, const Pointers& ptr, int threads);
void forward(const Problem& p, const Pointers& ptr, const Options& o, int threads);
void backward(const Problem& p, const Pointers& ptr, const Options& o, int threads);
void inspect(const Problem& p, const Pointers& ptr, const Options& o, const Map& wanted,
             int threads);

std::vector<std::string> supported_isas();  // of this machine
std::string isa();                          // the one in use
// Throws std::invalid_argument for a name that is unknown or that this machine lacks; "" is the
// default: the best one, but never avx512_amx, for which calls ask themselves.
void set_isa(const std::string& name);
bool isa_forced();                       // by its name: by set_isa or by ATTN_EXT_ISA
int isa_index(const std::string& name);  // for Options::isa; throws as set_isa does

// For tests, of every ISA that was compiled, whether or not this machine has it: its name, the
// features that its code uses (features.h), and the addresses of its kernels.
using IsaEntry = std::tuple<std::string, std::string, std::map<std::string, uintptr_t>>;
std::vector<IsaEntry> isa_table();

}  // namespace attn::cpu
