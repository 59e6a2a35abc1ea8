// What compiled PTX, which tests load as libraries of their own, calls in attn_ext._emulated:
// declared between these two, and protected there, so that the module's own calls stay direct.
#pragma once
#ifdef ATTN_COMPILED_PTX
#define ATTN_EXPORTED_BEGIN _Pragma("GCC visibility push(default)")
#else
#define ATTN_EXPORTED_BEGIN _Pragma("GCC visibility push(protected)")
#endif
#define ATTN_EXPORTED_END _Pragma("GCC visibility pop")
