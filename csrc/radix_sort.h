// Sorts scores for the exact metrics, faster than comparing them: by their bits, a byte at a time.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace spd {

constexpr int byte_bits = 8, byte_values = 1 << byte_bits;

// The bits of a float or double (Word is the unsigned integer of its size) as a number in the same
// order: all bits of a negative number turn round, of others just the sign. -0 comes before 0.
template <class Word>
inline Word key_of(Word bits) {
    constexpr Word sign = Word(1) << (8 * sizeof(Word) - 1);
    return bits & sign ? ~bits : bits | sign;
}
template <class Word>
inline Word bits_of_key(Word key) {
    constexpr Word sign = Word(1) << (8 * sizeof(Word) - 1);
    return key & sign ? key & ~sign : ~key;
}

// Turns counts into where each begins.
inline void begin_at(size_t* counts) {
    size_t begin = 0;
    for (int value = 0; value < byte_values; ++value) {
        const size_t count = counts[value];
        counts[value] = begin;
        begin += count;
    }
}

// Sorts n keys by their lowest `bytes` bytes, the lowest first; they end in `keys` or in `other`,
// and this returns which.
template <class Word>
inline Word* sort_by_bytes(Word* keys, Word* other, size_t n, int bytes) {
    size_t counts[sizeof(Word)][byte_values] = {};
    for (size_t i = 0; i < n; ++i)
        for (int byte = 0; byte < bytes; ++byte) ++counts[byte][keys[i] >> byte_bits * byte & 0xff];
    for (int byte = 0; byte < bytes; ++byte) {
        size_t* at = counts[byte];
        if (at[keys[0] >> byte_bits * byte & 0xff] == n) continue;  // all have the same
        begin_at(at);
        for (size_t i = 0; i < n; ++i) other[at[keys[i] >> byte_bits * byte & 0xff]++] = keys[i];
        std::swap(keys, other);
    }
    return keys;
}

// Sorts the n numbers with these bits, none of them NaN; scratch has room for n, too. First by the
// highest byte in which they differ from the lowest, so that the further bytes are sorted in cache.
template <class Word>
void radix_sort(Word* bits, Word* scratch, size_t n) {
    if (n == 0) return;
    Word lowest = ~Word(0), highest = 0;
    for (size_t i = 0; i < n; ++i) {
        lowest = std::min(lowest, key_of(bits[i]));
        highest = std::max(highest, key_of(bits[i]));
    }
    int shift = 0;  // leaves a byte of the largest difference
    while (shift < int(8 * sizeof(Word)) - byte_bits && (highest - lowest) >> shift >= byte_values)
        ++shift;

    size_t at[byte_values] = {};
    for (size_t i = 0; i < n; ++i) ++at[(key_of(bits[i]) - lowest) >> shift];
    begin_at(at);
    for (size_t i = 0; i < n; ++i) {
        const Word key = key_of(bits[i]) - lowest;
        scratch[at[key >> shift]++] = key;
    }
    size_t begin = 0;
    for (const size_t end : at) {  // it has moved on to where the next begins
        Word* sorted = scratch + begin;
        if (end - begin < byte_values)  // counting would take longer
            std::sort(sorted, scratch + end);
        else
            sorted = sort_by_bytes(sorted, bits + begin, end - begin,
                                   (shift + byte_bits - 1) / byte_bits);
        for (size_t i = begin; i < end; ++i)
            bits[i] = bits_of_key<Word>(sorted[i - begin] + lowest);
        begin = end;
    }
}

}  // namespace spd
