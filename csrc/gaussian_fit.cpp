// Fitting PaDiM on the CPU: running mean and scatter, then covariance -> Cholesky -> inverse
// factor, all in the packed panels, in place.

#include <cfloat>

#include "mahalanobis.h"
#include "panel.h"

namespace spd {
namespace SPD_ISA {
namespace {

constexpr int half = 4;  // columns of a block at a time
// So many blocks of L's panels at a time are multiplied by W: they stay in the first cache, and
// what they are multiplied by in the second, which matters more the busier the third one is.
constexpr int run = 12;

// sum[i][c] += over n steps, a vector of panel i times number c of the other factor, for the panels
// from number `from` on. Both lie `step`s apart, the numbers `across`. Inlined, or the sums would
// be in memory.
template <int from>
__attribute__((always_inline)) inline void add_products(Rows (&sum)[panel_group][half],
                                                        const float* const* panel, size_t step,
                                                        const float* other, size_t other_step,
                                                        size_t across, int n) {
#pragma GCC unroll 4
    for (int k = 0; k < n; ++k) {
        Rows column[panel_group];
        for (int i = from; i < panel_group; ++i) column[i] = load_rows(panel[i] + k * step);
        for (int c = 0; c < half; ++c)
            for (int i = from; i < panel_group; ++i)
                sum[i][c] += column[i] * other[k * other_step + c * across];
    }
}

template <int n>
struct Number {
    static constexpr int value = n;
};

// Calls body(Number<from>): the loops over a group's panels must have constant bounds, or their
// sums do not stay in registers.
template <class Body>
inline void starting_from(int from, const Body& body) {
    if (from == 0) return body(Number<0>{});
    if (from == 1) return body(Number<1>{});
    body(Number<2>{});
}

// Calls body(r, first) for groups of panels r .. r + panel_group - 1 of which those from r + first
// on count; what is left over at the end comes one by one.
template <class Body>
inline bool for_groups(int panel_count, const Body& body) {
    int r = 0;
    for (; r + panel_group <= panel_count; r += panel_group)
        if (!body(r, 0)) return false;
    for (; r < panel_count; ++r)
        if (!body(r - (panel_group - 1), panel_group - 1)) return false;
    return true;
}

// S += X^T X for rows x[n], n < rows, each `stride` floats with zeros past d.
void add_outer_products(float* scatter, int panel_count, const float* x, size_t stride, int rows) {
    for_groups(panel_count, [&](int r, int first) {
        const float* panel[panel_group];
        for (int i = first; i < panel_group; ++i) panel[i] = x + 8 * (r + i);
        for (int k = 0; k < 8 * (r + panel_group); k += half)
            starting_from(max2(first, k / 8 - r), [&](auto from) {
                Rows sum[panel_group][half] = {};
                add_products<from.value>(sum, panel, stride, x + k, stride, 1, rows);
                for (int i = from.value; i < panel_group; ++i)
                    for (int c = 0; c < half; ++c) {
                        float* column = scatter + panel_start(r + i) + 8 * (k + c);
                        store_rows(column, load_rows(column) + sum[i][c]);
                    }
            });
        return true;
    });
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

// An 8 x 8 block holds column c at block + 8 c.

// Cholesky of the lower triangle of an 8 x 8 block, but that the diagonal holds the reciprocals,
// which are all that is needed of it; the upper triangle becomes zero.
bool cholesky_block(float* a) {
    for (int j = 0; j < 8; ++j) {
        float pivot = a[9 * j];
        for (int i = 0; i < j; ++i) pivot -= a[8 * i + j] * a[8 * i + j];
        if (!(pivot > 0 && pivot <= FLT_MAX)) return false;  // NaN fails both
        const float reciprocal = 1 / sqrtf(pivot);
        for (int row = j + 1; row < 8; ++row) {
            float v = a[8 * j + row];
            for (int i = 0; i < j; ++i) v -= a[8 * i + row] * a[8 * i + j];
            a[8 * j + row] = v * reciprocal;
        }
        a[9 * j] = reciprocal;
        for (int row = 0; row < j; ++row) a[8 * j + row] = 0;
    }
    return true;
}

// target = target * L^-T for a block L of cholesky_block, of the group's panels from number `from`
// on. Solved, not multiplied by the inverse, which would lose the digits that covariances of few
// images need; all panels at once, as each step waits for the one before it.
template <int from>
void solve_blocks(float* const* panel, int c, const float* lower) {
    Rows v[panel_group][8];
    for (int p = from; p < panel_group; ++p)
        for (int j = 0; j < 8; ++j) v[p][j] = load_rows(panel[p] + 64 * c + 8 * j);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        for (int p = from; p < panel_group; ++p) v[p][i] *= lower[9 * i];
#pragma GCC unroll 8
        for (int j = i + 1; j < 8; ++j)
            for (int p = from; p < panel_group; ++p) v[p][j] -= v[p][i] * lower[8 * i + j];
    }
    for (int p = from; p < panel_group; ++p)
        for (int j = 0; j < 8; ++j) store_rows(panel[p] + 64 * c + 8 * j, v[p][j]);
}

void invert_block(const float* lower, float* inverse) {
    for (int c = 0; c < 8; ++c)
        for (int row = 0; row < 8; ++row) {
            float v = row == c ? 1.f : 0.f;
            for (int i = c; i < row; ++i) v -= lower[8 * i + row] * inverse[8 * c + i];
            inverse[8 * c + row] = row < c ? 0 : v * lower[9 * row];
        }
}

// A = L L^T, a group of panels after the other, in place: block (r, c) minus the product of what
// precedes it in panels r and c, then solved with L_cc.
bool cholesky(float* a, int panel_count) {
    return for_groups(panel_count, [&](int r, int first) {
        float* panel[panel_group];
        for (int i = first; i < panel_group; ++i) panel[i] = a + panel_start(r + i);
        for (int c = 0; c < r + panel_group; ++c) {
            float* above = a + panel_start(c);
            starting_from(max2(first, c - r), [&](auto from) {
                for (int h = 0; h < 8; h += half) {
                    Rows sum[panel_group][half] = {};
                    add_products<from.value>(sum, panel, 8, above + h, 8, 1, 8 * c);
                    for (int i = from.value; i < panel_group; ++i)
                        for (int q = 0; q < half; ++q) {
                            float* column = panel[i] + 64 * c + 8 * (h + q);
                            store_rows(column, load_rows(column) - sum[i][q]);
                        }
                }
            });
            const int diagonal = c - r;  // this one of the group's panels, if any
            if (diagonal >= first && !cholesky_block(above + 64 * c)) return false;
            const int below = max2(first, diagonal + 1);
            if (below < panel_group)
                starting_from(
                    below, [&](auto from) { solve_blocks<from.value>(panel, c, above + 64 * c); });
        }
        return true;
    });
}

// target += left * right
void add_block_product(Rows* target, const float* left, const float* right) {
    for (int i = 0; i < 8; ++i)
        for (int q = 0; q < 8; ++q) target[q] += load_rows(left + 8 * i) * right[8 * q + i];
}

// The group's own blocks of L, from number `done` on, to their inverse.
void invert_corner(float* const* panel, int first, int done) {
    for (int i = first; i < panel_group; ++i) {
        float* row = panel[i] + 64 * done;
        const int diagonal = i - first;
        float inverse[64];
        invert_block(row + 64 * diagonal, inverse);
        for (int c = 0; c < diagonal; ++c) {
            Rows sum[8] = {}, product[8] = {};
            for (int j = c; j < diagonal; ++j)
                add_block_product(sum, row + 64 * j, panel[first + j] + 64 * (done + c));
            for (int q = 0; q < 8; ++q) store_rows(row + 64 * c + 8 * q, -sum[q]);
            add_block_product(product, inverse, row + 64 * c);
            for (int q = 0; q < 8; ++q) store_rows(row + 64 * c + 8 * q, product[q]);
        }
        memcpy(row + 64 * diagonal, inverse, sizeof inverse);
    }
}

// sum += block number `block` of the panels from number `from` on, times columns of one more block.
template <int from>
__attribute__((always_inline)) inline void add_blocks(Rows (&sum)[panel_group][half],
                                                      float* const* panel, int block,
                                                      const float* columns) {
    const float* left[panel_group];
    for (int i = from; i < panel_group; ++i) left[i] = panel[i] + 64 * block;
    add_products<from>(sum, left, 8, columns, 1, 8, 8);
}

// Of all c < done: block c of `sums` = sum over j = c .. done - 1 of block j of the panels times
// block c of panel j of `a`.
template <int from>
void multiply_by_done(float* const* panel, const float* a, int done, float* const* sums) {
    for (int begin = 0; begin < done; begin += run) {
        const int end = min2(begin + run, done);
        for (int c = 0; c < end; ++c)
            for (int h = 0; h < 8; h += half) {
                const int place = 64 * c + 8 * h;
                Rows sum[panel_group][half] = {};
                for (int i = from; i < panel_group && c < begin; ++i)
                    for (int q = 0; q < half; ++q) sum[i][q] = load_rows(sums[i] + place + 8 * q);
                const float* columns = a + panel_start(max2(begin, c)) + place;
                for (int j = max2(begin, c); j < end; ++j) {
                    add_blocks<from>(sum, panel, j, columns);
                    columns += 64 * (j + 1);
                }
                for (int i = from; i < panel_group; ++i)
                    for (int q = 0; q < half; ++q) store_rows(sums[i] + place + 8 * q, sum[i][q]);
            }
    }
}

// L, as `cholesky` leaves it, becomes W = scale * L^-1, a group of panels after the other, in
// place: of panels R, M = L_RR^-1 and W_Rc = -M * (sum over j = c..r-1 of L_Rj W_jc). `memory` has
// room for panel_group times 64 * panel_count floats.
void invert(float* a, int panel_count, float scale, float* memory) {
    for_groups(panel_count, [&](int r, int first) {
        const int done = r + first;  // panels of W there are
        float *panel[panel_group], *sums[panel_group];
        for (int i = first; i < panel_group; ++i) {
            panel[i] = a + panel_start(r + i);
            sums[i] = memory + i * 64 * size_t(panel_count);
        }
        starting_from(first,
                      [&](auto from) { multiply_by_done<from.value>(panel, a, done, sums); });
        invert_corner(panel, first, done);
        for (int place = 0; place < 64 * done; place += 8 * half) {
            Rows sum[panel_group][half] = {};
            for (int k = first; k < panel_group; ++k)
                starting_from(k, [&](auto from) {
                    add_blocks<from.value>(sum, panel, done + k - first, sums[k] + place);
                });
            for (int i = first; i < panel_group; ++i)
                for (int q = 0; q < half; ++q) store_rows(panel[i] + place + 8 * q, -sum[i][q]);
        }
        for (int i = first; i < panel_group; ++i)
            for (int k = 0; k < 64 * (i - first + 1); ++k) panel[i][64 * done + k] *= scale;
        return true;
    });
}

template <int block>
bool update_positions(const GaussianUpdateArgs& args, int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    const Features& f = args.features;
    const size_t stride = 8 * size_t(panels(f.d));
    const int rows = (f.batch + quad - 1) / quad * quad + 1;
    const size_t position_stride = rows * stride + 16;
    Pieces pieces = scratch.reserve(block * position_stride + stride + 2 * 16);
    if (!pieces.next) return false;
    float* x = pieces.take(block * position_stride);
    float* block_mean = pieces.take(stride);
    memset(x, 0, block * position_stride * sizeof(float));
    for (int64_t p0 = begin; p0 < end; p0 += block) {
        const int count = int(min2<int64_t>(block, end - p0));
        gather<block>(f, p0, count, -1, [&](int q, int k, int j, const float* values) {
            float* d = x + j * position_stride + q * quad * stride + k;
            for (int b = 0; b < quad; ++b) d[b * stride] = values[b];
        });
        for (int64_t p = p0; p < p0 + count; ++p) {
            float* images = x + (p - p0) * position_stride;
            const int n = centre_and_merge(images, stride, f.batch, f.d, args.count,
                                           args.mean + p * f.d, block_mean);
            add_outer_products(args.scatter + p * packed_size(f.d), panels(f.d), images, stride, n);
        }
    }
    return true;
}

}  // namespace

bool gaussian_update(const GaussianUpdateArgs& args, int64_t begin, int64_t end) {
    if (channels_are_last(args.features)) return update_positions<1>(args, begin, end);
    return update_positions<planar_positions>(args, begin, end);
}

int64_t gaussian_factor(const GaussianFactorArgs& args, int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    const int d = args.d, padded = 8 * panels(d);
    const size_t size = packed_size(d);
    float* memory = scratch.reserve(panel_group * 8 * size_t(padded)).next;
    if (!memory) return no_memory;
    const float freedom = float(args.count - 1), ridge = freedom * args.ridge;
    for (int64_t p = begin; p < end; ++p) {
        // Of the covariance times count - 1, so that nothing is divided.
        float* a = args.scatter + p * size;
        for (int i = 0; i < d; ++i) a[packed_place(i, i)] += ridge;
        for (int i = d; i < padded; ++i) a[packed_place(i, i)] = 1;  // rows past d stay separate
        if (!cholesky(a, panels(d))) return p;
        invert(a, panels(d), sqrtf(freedom), memory);
        for (int i = d; i < padded; ++i) a[packed_place(i, i)] = 0;
    }
    return all_positive;
}

}  // namespace SPD_ISA
}  // namespace spd
