// Gaussian blur of a view, and SmoothBlend's alpha, which is a blurred interval along each axis.
#pragma once

#include "augment_views.h"
#include "views_resize.h"

namespace spd {
namespace {  // internal linkage: see common.h

constexpr float negligible_tap = 1e-6f;
constexpr int band = 4;  // rows that are blurred together

// Weights of taps 0..radius, normalised over the whole kernel.
void gaussian_taps(float* w, int radius, float sigma) {
    double sum = 0;
    for (int k = -radius; k <= radius; ++k) sum += gaussian_tap(k, sigma);
    for (int k = 0; k <= radius; ++k) w[k] = float(gaussian_tap(k, sigma) / sum);
}

// d[x] = w[0] * s[x] + sum over k of w[k] * (s[x - k] + s[x + k]), n a multiple of row_multiple
void blur_line(float* d, const float* s, int n, const float* w, int radius) {
    constexpr int vectors = row_multiple / lanes;
    for (int x = 0; x < n; x += row_multiple) {
        Floats sum[vectors];
        for (int j = 0; j < vectors; ++j) sum[j] = load(s + x + j * lanes) * w[0];
        for (int k = 1; k <= radius; ++k)
            for (int j = 0; j < vectors; ++j) {
                const float* centre = s + x + j * lanes;
                sum[j] += (load(centre - k) + load(centre + k)) * w[k];
            }
        for (int j = 0; j < vectors; ++j) store(d + x + j * lanes, sum[j]);
    }
}

// Four blurred rows d, d + stride, ... from the rows s[0] .. s[2 * radius + 3]. Every vector that
// is loaded serves four sums: one row at a time, the loads would take longer than the arithmetic.
// `w` are the taps -radius..radius with three zeros on either side.
void blur_band(float* d, ptrdiff_t stride, const float* const* s, int n, const float* w,
               int radius) {
    for (int x = 0; x < n; x += 2 * lanes) {
        Floats sum[band][2] = {};
        for (int k = 0; k < 2 * radius + band; ++k) {
            const Floats a = load(s[k] + x), b = load(s[k] + x + lanes);
            for (int j = 0; j < band; ++j) {
                sum[j][0] += a * w[k + band - 1 - j];
                sum[j][1] += b * w[k + band - 1 - j];
            }
        }
        for (int j = 0; j < band; ++j) {
            store(d + j * stride + x, sum[j][0]);
            store(d + j * stride + x + lanes, sum[j][1]);
        }
    }
}

// Fills `reach` places on either side of n with their mirror images.
void mirror_ends(float* line, int n, int reach) {
    if (reach < n)  // nearly always; `reflect` divides
        for (int k = 1; k <= reach; ++k) line[-k] = line[k], line[n - 1 + k] = line[n - 1 - k];
    else
        for (int k = 1; k <= reach; ++k) {
            line[-k] = line[reflect(-k, n)];
            line[n - 1 + k] = line[reflect(n - 1 + k, n)];
        }
}

// Blurs a plane four rows at a time. Scratch memory is set up once per view.
class Blur {
  public:
    // Not negligible taps only; what is cut off is not added to the others, as in a full kernel.
    Blur(float sigma, const Plane& plane, Pieces& pieces) : plane_(plane) {
        const int full = sigma > 0 ? blur_radius(plane.height) : 0;
        taps_ = pieces.take(full + 1);
        gaussian_taps(taps_, full, sigma > 0 ? sigma : 1);
        radius_ = full;
        while (radius_ > 0 && taps_[radius_] < negligible_tap) --radius_;
        spread_ = pieces.take(2 * radius_ + 2 * band);
        memset(spread_, 0, (2 * radius_ + 2 * band) * sizeof(float));
        for (int k = -radius_; k <= radius_; ++k)
            spread_[band - 1 + radius_ + k] = taps_[k < 0 ? -k : k];
        rows_ = reinterpret_cast<const float**>(pieces.take(2 * (2 * radius_ + band)));
        line_pitch_ = plane.pitch + 2 * padded(radius_);
        lines_ = pieces.take(size_t(band) * line_pitch_);
    }

    int radius() const { return radius_; }

    // Rows y .. y + rows - 1 of the blurred plane, at most four, to `d`.
    void make_rows(float* d, int y, int rows) const {
        const int margin = padded(radius_);
        for (int c = 0; c < 3; ++c) {
            for (int k = 0; k < 2 * radius_ + band; ++k)
                rows_[k] = plane_.at(reflect(y - radius_ + k, plane_.height)) + c * plane_.pitch;
            blur_band(lines_ + margin, line_pitch_, rows_, plane_.pitch, spread_, radius_);
            for (int j = 0; j < rows; ++j) {
                float* line = lines_ + j * line_pitch_ + margin;
                mirror_ends(line, plane_.width, radius_);
                blur_line(d + j * plane_.row + c * plane_.pitch, line, plane_.pitch, taps_,
                          radius_);
            }
        }
    }

  private:
    Plane plane_;
    int radius_, line_pitch_;
    float *taps_, *spread_, *lines_;
    const float** rows_;
};

size_t blur_scratch(int height, int width) {
    const size_t radius = blur_radius(height);
    return 7 * radius + 4 * band + band * (padded(width) + 2 * padded(int(radius))) + 4 * 16;
}

}  // namespace
}  // namespace spd
