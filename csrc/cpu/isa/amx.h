// May this process use Intel AMX's tiles and their bfloat16 products?
#pragma once

#if defined(__x86_64__) && defined(__linux__) && __GNUC__ >= 11  // which knows the instructions
#define ATTN_HAS_AMX
#endif

namespace attn::cpu::amx {

// The processor has them, and the kernel would hand them out.
bool present();
// The kernel does so from now on, in all threads.  Asked for on first use only: signal frames grow.
bool permitted();
// For tests: both are true from now on, since an emulator of the instructions is installed.
void emulate(bool on);

}  // namespace attn::cpu::amx
