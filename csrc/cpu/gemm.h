// The one product of this backend:  C[r][q] (+)= sum_k A(r, k) * B[k][q],  scalars of A broadcast
// against rows of B.
//   forward   S^T[key][query]   = K[key][d]    * Q^T[d][query]
//             O^T[dv][query]   += V^T[dv][key] * P^T[key][query]
//   backward  dP^T[key][query]  = V * dO^T,   dV[key][dv] += P^T * dO,   dK[key][d] += dS^T * Q,
//   dQ^T[d][query] += K^T * dS^T
// A is read where it lies (any strides), exactly `rows` x `depth` of it; B and C are scratch,
// padded to whole vectors.

// One block of ROWS x (NV vectors): the accumulators stay in registers over the whole depth.
template <class T, int ROWS, int NV>
ATTN_INLINE void gemm_block(int64_t depth, const T* A, int64_t row_stride, int64_t depth_stride,
                            const T* B, int64_t ldb, T* C, int64_t ldc, bool accumulate) {
  constexpr int L = kLanes<T>;
  Vec<T> acc[ROWS][NV];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) acc[r][v] = accumulate ? load(C + r * ldc + v * L) : Vec<T>{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> b[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) b[v] = load(B + k * ldb + v * L);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const Vec<T> a = set1(A[r * row_stride + k * depth_stride]);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[r][v] += a * b[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) store(C + r * ldc + v * L, acc[r][v]);
}

template <class T, int NV>
inline void gemm_panel(int64_t rows, int64_t depth, const T* A, int64_t row_stride,
                       int64_t depth_stride, const T* B, int64_t ldb, T* C, int64_t ldc,
                       bool accumulate) {
  int64_t r = 0;
  for (; r + ATTN_MR <= rows; r += ATTN_MR)
    gemm_block<T, ATTN_MR, NV>(depth, A + r * row_stride, row_stride, depth_stride, B, ldb,
                               C + r * ldc, ldc, accumulate);
  if (rows - r >= 4) {
    gemm_block<T, 4, NV>(depth, A + r * row_stride, row_stride, depth_stride, B, ldb, C + r * ldc,
                         ldc, accumulate);
    r += 4;
  }
  if (rows - r >= 2) {
    gemm_block<T, 2, NV>(depth, A + r * row_stride, row_stride, depth_stride, B, ldb, C + r * ldc,
                         ldc, accumulate);
    r += 2;
  }
  if (rows - r >= 1)
    gemm_block<T, 1, NV>(depth, A + r * row_stride, row_stride, depth_stride, B, ldb, C + r * ldc,
                         ldc, accumulate);
}

// columns is a multiple of kLanes<T>.
template <class T>
inline void gemm(int64_t rows, int64_t columns, int64_t depth, const T* A, int64_t row_stride,
                 int64_t depth_stride, const T* B, int64_t ldb, T* C, int64_t ldc,
                 bool accumulate) {
  int64_t q = 0;
  for (; q + kPanel<T> <= columns; q += kPanel<T>)
    gemm_panel<T, ATTN_NV>(rows, depth, A, row_stride, depth_stride, B + q, ldb, C + q, ldc,
                           accumulate);
  for (; q < columns; q += kLanes<T>)
    gemm_panel<T, 1>(rows, depth, A, row_stride, depth_stride, B + q, ldb, C + q, ldc, accumulate);
}
