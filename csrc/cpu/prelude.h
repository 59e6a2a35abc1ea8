// All that the kernel text needs from outside, included before a target region opens: no library
// function may be compiled for an ISA that the machine may lack.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
// g++ 12 warns of the operand that its own header leaves undefined on purpose.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "cpu/convert.h"
#include "cpu/family_options.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/sequence.h"
#include "cpu/targets.h"
#include "params.h"
#include "philox.h"
