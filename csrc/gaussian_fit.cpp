// Fitting PaDiM on the CPU: running mean and scatter, then covariance -> Cholesky -> inverse
// factor, all in the packed panels, in place.

#include "mahalanobis.h"
#include "panel.h"

namespace spd {
namespace SPD_ISA {
namespace {

// S += X^T X for rows x[n], n < rows, each `stride` floats with zeros past d.
void add_outer_products(float* scatter, int panel_count, const float* x, size_t stride, int rows) {
    for (int r = 0; r < panel_count; ++r)
        for (int k = 0; k < 8 * (r + 1); k += 8) {
            Rows sum[8] = {};
            for (int n = 0; n < rows; ++n) {
                const float* row = x + n * stride;
                const Rows panel = load_rows(row + 8 * r);
                for (int c = 0; c < 8; ++c) sum[c] += panel * row[k + c];
            }
            float* block = scatter + panel_start(r) + 8 * k;
            for (int c = 0; c < 8; ++c)
                store_rows(block + 8 * c, load_rows(block + 8 * c) + sum[c]);
        }
}

// Centres the block about its own mean and merges it into the running mean; the shift between the
// two means becomes one more row, so that the merge is the same outer product.
int centre_and_merge(float* x, size_t stride, int rows, int d, int64_t count, float* mean,
                     float* block_mean) {
    for (int k = 0; k < d; ++k) block_mean[k] = 0;
    for (int n = 0; n < rows; ++n)
        for (int k = 0; k < d; ++k) block_mean[k] += x[n * stride + k];
    for (int k = 0; k < d; ++k) block_mean[k] /= rows;
    for (int n = 0; n < rows; ++n)
        for (int k = 0; k < d; ++k) x[n * stride + k] -= block_mean[k];
    const double total = double(count) + rows;
    const float weight = float(rows / total), shift = float(sqrt(count * (rows / total)));
    for (int k = 0; k < d; ++k) {
        const float delta = block_mean[k] - mean[k];
        x[rows * stride + k] = shift * delta;
        mean[k] += weight * delta;
    }
    return count > 0 ? rows + 1 : rows;
}

// A 8 x 8 block holds column c at block + 8 c.
//
// target -= left * right^T over `columns` columns: left and right are panels, `right` supplies the
// 8 columns of the target.
void subtract_product(float* target, const float* left, const float* right, int columns) {
    Rows sum[8];
    for (int c = 0; c < 8; ++c) sum[c] = load_rows(target + 8 * c);
    for (int k = 0; k < columns; ++k) {
        const Rows column = load_rows(left + 8 * k);
        for (int c = 0; c < 8; ++c) sum[c] -= column * right[8 * k + c];
    }
    for (int c = 0; c < 8; ++c) store_rows(target + 8 * c, sum[c]);
}

// Cholesky of the lower triangle of an 8 x 8 block; the upper one becomes zero.
bool cholesky_block(float* a) {
    for (int j = 0; j < 8; ++j) {
        float pivot = a[9 * j];
        for (int i = 0; i < j; ++i) pivot -= a[8 * i + j] * a[8 * i + j];
        if (!(pivot > 0)) return false;  // also for NaN
        pivot = sqrtf(pivot);
        for (int row = j + 1; row < 8; ++row) {
            float v = a[8 * j + row];
            for (int i = 0; i < j; ++i) v -= a[8 * i + row] * a[8 * i + j];
            a[8 * j + row] = v / pivot;
        }
        a[9 * j] = pivot;
        for (int row = 0; row < j; ++row) a[8 * j + row] = 0;
    }
    return true;
}

// target = target * L^-T for the lower triangular 8 x 8 block L
void solve_block(float* target, const float* lower) {
    for (int j = 0; j < 8; ++j) {
        Rows v = load_rows(target + 8 * j);
        for (int i = 0; i < j; ++i) v -= load_rows(target + 8 * i) * lower[8 * i + j];
        store_rows(target + 8 * j, v / lower[9 * j]);
    }
}

void invert_block(const float* lower, float* inverse) {
    for (int c = 0; c < 8; ++c)
        for (int row = 0; row < 8; ++row) {
            float v = row == c ? 1.f : 0.f;
            for (int i = c; i < row; ++i) v -= lower[8 * i + row] * inverse[8 * c + i];
            inverse[8 * c + row] = row < c ? 0 : v / lower[9 * row];
        }
}

// A = L L^T, panel by panel, in place.
bool cholesky(float* a, int panel_count) {
    for (int r = 0; r < panel_count; ++r) {
        float* panel = a + panel_start(r);
        for (int c = 0; c <= r; ++c) {
            const float* above = a + panel_start(c);
            float* block = panel + 64 * c;
            subtract_product(block, panel, above, 8 * c);
            if (c < r)
                solve_block(block, above + 64 * c);
            else if (!cholesky_block(block))
                return false;
        }
    }
    return true;
}

// L becomes W = L^-1, panel by panel, in place: W_rr = L_rr^-1 and, for c < r,
// W_rc = -L_rr^-1 * (sum over j = c..r-1 of L_rj W_jc). `old` holds one panel of L.
void invert(float* a, int panel_count, float* old) {
    for (int r = 0; r < panel_count; ++r) {
        float* panel = a + panel_start(r);
        float diagonal[64];
        memcpy(old, panel, 64 * size_t(r + 1) * sizeof(float));
        invert_block(old + 64 * r, diagonal);
        for (int c = 0; c < r; ++c) {
            Rows sum[8] = {};
            for (int j = c; j < r; ++j) {
                const float* w = a + panel_start(j) + 64 * c;
                for (int i = 0; i < 8; ++i) {
                    const Rows column = load_rows(old + 64 * j + 8 * i);
                    for (int q = 0; q < 8; ++q) sum[q] -= column * w[8 * q + i];
                }
            }
            for (int q = 0; q < 8; ++q) {
                Rows v = {};
                for (int i = 0; i < 8; ++i) v += load_rows(diagonal + 8 * i) * sum[q][i];
                store_rows(panel + 64 * c + 8 * q, v);
            }
        }
        memcpy(panel + 64 * r, diagonal, sizeof diagonal);
    }
}

}  // namespace

void gaussian_update(const GaussianUpdateArgs& args, int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    const Features& f = args.features;
    const size_t stride = 8 * size_t(panels(f.d));
    const size_t position_stride = stride * (f.batch + 1) + 16;
    Pieces pieces = scratch.reserve(gather_positions * position_stride + stride + 64);
    float* x = pieces.take(gather_positions * position_stride);
    float* block_mean = pieces.take(stride);
    memset(x, 0, gather_positions * position_stride * sizeof(float));
    for (int64_t p0 = begin; p0 < end; p0 += gather_positions) {
        const int count = int(min2<int64_t>(gather_positions, end - p0));
        gather(f, p0, count, x, position_stride, 1, stride);
        for (int j = 0; j < count; ++j) {
            float* rows = x + j * position_stride;
            const int n = centre_and_merge(rows, stride, f.batch, f.d, args.count,
                                           args.mean + (p0 + j) * f.d, block_mean);
            add_outer_products(args.scatter + (p0 + j) * packed_size(f.d), panels(f.d), rows,
                               stride, n);
        }
    }
}

int64_t gaussian_factor(const GaussianFactorArgs& args, int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    const int d = args.d, padded = 8 * panels(d);
    const size_t size = packed_size(d);
    float* old = scratch.reserve(8 * size_t(padded)).next;
    for (int64_t p = begin; p < end; ++p) {
        float* a = args.scatter + p * size;
        for (size_t i = 0; i < size; ++i) a[i] /= float(args.count - 1);
        for (int i = 0; i < d; ++i) a[packed_place(i, i)] += args.ridge;
        for (int i = d; i < padded; ++i) a[packed_place(i, i)] = 1;  // rows past d stay separate
        if (!cholesky(a, panels(d))) return p;
        invert(a, panels(d), old);
        for (int i = d; i < padded; ++i) a[packed_place(i, i)] = 0;
    }
    return -1;
}

}  // namespace SPD_ISA
}  // namespace spd
