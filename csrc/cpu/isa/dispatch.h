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

// The tangents of O and LSE, and those of the gradients (kernels/tangent.h, backward_tangent.h), of
// softmax attention that is not float64.  Each address in tptr is that of the tangent of what ptr
// has under the same name, null where it is 0.  False where another backend must serve the call.
bool tangent(const Problem& p, const Pointers& ptr, const Options& o, const Problem& tp,
             const Pointers& tptr, int threads);
bool backward_tangent(const Problem& p, const Pointers& ptr, const Options& o, const Problem& tp,
                      const Pointers& tptr, int threads);
// For tests: the functions at these addresses take the place of these, of inspect and of the
// backward; 0: they have it again.
void plant(uintptr_t tangent, uintptr_t backward_tangent, uintptr_t inspect, uintptr_t backward);

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
