// All that the kernel text needs from outside, included before a target region opens: no library
// function may be compiled for an ISA that the machine may lack.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#include "cpu/convert.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/sequence.h"
#include "params.h"
#include "philox.h"
