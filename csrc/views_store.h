// Normalise and store rows of a view, in the output's type and layout.
#pragma once

#include "augment_views.h"
#include "views_resize.h"

namespace spd {
namespace {  // internal linkage: see common.h

// stored = v * scale + shift, per channel
struct Normalise {
    float scale, shift;
};

// One channel of a row, contiguous, n numbers.

template <bool streamed>
void convert(float* d, const float* s, int n, Normalise m) {
    int i = 0;
    for (; i + lanes <= n; i += lanes) put<streamed>(d + i, load(s + i) * m.scale + m.shift);
    for (; i < n; ++i) d[i] = s[i] * m.scale + m.shift;
}

struct Half {
    uint16_t bits;
};

template <bool streamed>
void convert(Half* __restrict d, const float* __restrict s, int n, Normalise m) {
    int i = 0;
#ifdef SPD_HAS_PUT_HALF
    for (; i + lanes <= n; i += lanes)
        put_half<streamed>(&d[i].bits, load(s + i) * m.scale + m.shift);
#endif
    for (; i < n; ++i) d[i].bits = to_half(s[i] * m.scale + m.shift);
}

struct BFloat {
    uint16_t bits;
};

template <bool streamed>
void convert(BFloat* __restrict d, const float* __restrict s, int n, Normalise m) {
    for (int i = 0; i < n; ++i) d[i].bits = to_bfloat16(s[i] * m.scale + m.shift);
}

// 8-bit output is not normalised.
template <bool streamed>
void convert(uint8_t* __restrict d, const float* __restrict s, int n, Normalise) {
    for (int i = 0; i < n; ++i) d[i] = to_uint8(s[i]);
}

template <class T>
void interleave(T* __restrict d, const T* __restrict planar, int pitch, int n) {
    for (int x = 0; x < n; ++x)
        for (int c = 0; c < 3; ++c) d[3 * x + c] = planar[c * pitch + x];
}

static inline void stream(float* d, Floats v) { put<true>(d, v); }

#ifdef SPD_HAS_PUT_HALF
static inline void stream(Half* d, Floats v) { put_half<true>(&d->bits, v); }
#endif

// Three channels at once, interleaved by lookups: place 3 x + c of the result is place x of channel
// c. n is a multiple of lanes, d aligned as streams have to be.
template <class T>
void stream_interleaved(T* d, const float* s, int pitch, int n, const Normalise* m) {
    Ints from[3], green[3], blue[3];
    for (int part = 0; part < 3; ++part)
        for (int j = 0; j < lanes; ++j) {
            const int place = part * lanes + j;
            from[part][j] = place / 3;
            green[part][j] = place % 3 == 1 ? -1 : 0;
            blue[part][j] = place % 3 == 2 ? -1 : 0;
        }
    for (int x = 0; x < n; x += lanes) {
        const Floats r = load(s + x) * m[0].scale + m[0].shift;
        const Floats g = load(s + pitch + x) * m[1].scale + m[1].shift;
        const Floats b = load(s + 2 * pitch + x) * m[2].scale + m[2].shift;
        for (int part = 0; part < 3; ++part) {
            Floats v = lookup(r, from[part]);
            v = green[part] ? lookup(g, from[part]) : v;
            v = blue[part] ? lookup(b, from[part]) : v;
            stream(d + 3 * x + part * lanes, v);
        }
    }
}

template <class T>
constexpr bool can_interleave = false;
template <>
constexpr bool can_interleave<float> = has_lookup;
#ifdef SPD_HAS_PUT_HALF
template <>
constexpr bool can_interleave<Half> = has_lookup;
#endif

// Where the views of one image go.
class Store {
  public:
    Store(const AugmentArgs& args, int64_t image, Pieces& pieces) : args_(args), image_(image) {
        line_ = pieces.take(3 * size_t(args.width));
        for (int c = 0; c < 3; ++c) normalise_[c] = {args.scale[c], args.shift[c]};
        // Whole rows are written past the caches where every row begins at a whole vector.
        const int64_t* stride = args.stride;
        planar_ = stride[4] == 1;
        interleaved_ = stride[4] == 3 && stride[2] == 1;
        const int64_t bytes = args.dtype == DType::float32 ? 4 : 2;
        const int64_t steps =
            stride[0] | stride[1] | stride[3] | (planar_ ? stride[2] : 0) | args.width;
        streamed_ = reinterpret_cast<uintptr_t>(args.out) % (bytes * lanes) == 0 &&
                    steps % lanes == 0 && (planar_ || interleaved_) &&
                    (args.dtype == DType::float32 || args.dtype == DType::float16);
    }

    void row(int view, int y, const float* row, int pitch) const {
        part_of_row(view, y, row, pitch, 0, args_.width);
    }

    // Columns x0 .. x1 - 1 only.
    void part_of_row(int view, int y, const float* row, int pitch, int x0, int x1) const {
        switch (args_.dtype) {
            case DType::float32: return typed_part<float>(view, y, row, pitch, x0, x1);
            case DType::float16: return typed_part<Half>(view, y, row, pitch, x0, x1);
            case DType::bfloat16: return typed_part<BFloat>(view, y, row, pitch, x0, x1);
            case DType::uint8: return typed_part<uint8_t>(view, y, row, pitch, x0, x1);
        }
    }

    bool streamed() const { return streamed_; }

  private:
    template <class T>
    void typed_part(int view, int y, const float* row, int pitch, int x0, int x1) const {
        const int64_t* stride = args_.stride;
        const int n = x1 - x0;
        T* out = static_cast<T*>(args_.out) + view * stride[0] + image_ * stride[1] +
                 y * stride[3] + x0 * stride[4];
        const float* s = row + x0;
        const bool whole = streamed_ && n == args_.width;
        if (planar_) {
            for (int c = 0; c < 3; ++c) {
                T* d = out + c * stride[2];
                if (whole)
                    convert<true>(d, s + c * pitch, n, normalise_[c]);
                else
                    convert<false>(d, s + c * pitch, n, normalise_[c]);
            }
            return;
        }
        if constexpr (can_interleave<T>)
            if (whole) return stream_interleaved(out, s, pitch, n, normalise_);
        T* line = reinterpret_cast<T*>(line_);
        for (int c = 0; c < 3; ++c) convert<false>(line + c * n, s + c * pitch, n, normalise_[c]);
        if (interleaved_)
            interleave(out, line, n, n);
        else
            for (int c = 0; c < 3; ++c)
                for (int x = 0; x < n; ++x) out[c * stride[2] + x * stride[4]] = line[c * n + x];
    }

    const AugmentArgs& args_;
    int64_t image_;
    Normalise normalise_[3];
    float* line_;
    bool planar_, interleaved_, streamed_;
};

}  // namespace
}  // namespace spd
