// Gaussian blur of a view, and SmoothBlend's alpha, which is a blurred interval along each axis.
#pragma once

#include "augment_views.h"
#include "views_resize.h"

namespace spd {
namespace {  // internal linkage: see common.h

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

// Weights of a pair of rows, each the same way in from its end of a band's source rows, for the
// sum and for the difference of the two; outermost output rows first.
struct PairTaps {
    float even[band / 2], odd[band / 2];
};

// With w[-radius..radius] = taps, output j of a band is the sum of w[i - j - radius] s[i]. Since w
// is symmetric, output 3 - j is the same sum with the source rows in reverse order.
void pair_taps(PairTaps* pairs, const float* taps, int radius) {
    const auto w = [=](int k) { return k < -radius || k > radius ? 0 : taps[k < 0 ? -k : k]; };
    for (int k = 0; k < radius + band / 2; ++k)
        for (int j = 0; j < band / 2; ++j) {
            const float a = w(k - j - radius), b = w(k - (band - 1 - j) - radius);
            pairs[k].even[j] = (a + b) / 2;
            pairs[k].odd[j] = (a - b) / 2;
        }
}

// Four blurred rows d, d + stride, ... from the rows s[0] .. s[2 * radius + 3]. What is loaded
// serves four rows; going by pairs of source rows halves the multiplications. A weight of zero is
// the difference of two equal ones, so even rows that only serve outputs past the end must be
// finite.
void blur_band(float* d, ptrdiff_t stride, const float* const* s, int n, const PairTaps* pairs,
               int radius) {
    const int last = 2 * radius + band - 1;
    for (int x = 0; x < n; x += 2 * lanes) {
        Floats even[2][2] = {}, odd[2][2] = {};
        for (int k = 0; k < radius + band / 2; ++k)
            for (int v = 0; v < 2; ++v) {
                const Floats above = load(s[k] + x + v * lanes);
                const Floats below = load(s[last - k] + x + v * lanes);
                for (int j = 0; j < 2; ++j) {
                    even[j][v] += (above + below) * pairs[k].even[j];
                    odd[j][v] += (above - below) * pairs[k].odd[j];
                }
            }
        for (int j = 0; j < 2; ++j)
            for (int v = 0; v < 2; ++v) {
                float* to = d + x + v * lanes;
                store(to + j * stride, even[j][v] + odd[j][v]);
                store(to + (band - 1 - j) * stride, even[j][v] - odd[j][v]);
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
        pairs_ = reinterpret_cast<PairTaps*>(pieces.take(band * (radius_ + band / 2)));
        pair_taps(pairs_, taps_, radius_);
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
            blur_band(lines_ + margin, line_pitch_, rows_, plane_.pitch, pairs_, radius_);
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
    float *taps_, *lines_;
    PairTaps* pairs_;
    const float** rows_;
};

size_t blur_scratch(int height, int width) {
    const size_t radius = blur_radius(height);
    return 9 * radius + 5 * band + band * (padded(width) + 2 * padded(int(radius))) + 4 * 16;
}

}  // namespace
}  // namespace spd
