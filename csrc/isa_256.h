// What the 256-bit instruction sets share: half a block of a tile, 8 rows, in a register. Included inside their
// regions; tile_kernels.h says what each of these is for.

struct Vectors256 {
    using Bytes = __m256i;
    using Ints = __m256i;
    static constexpr int kBytes = 32;
    static constexpr bool kByteShifts = false;

    TRITKIT_INLINE __m256i load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    TRITKIT_INLINE void store_bytes(uint8_t* p, __m256i v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
    TRITKIT_INLINE __m256i splat(uint8_t byte) { return _mm256_set1_epi8(static_cast<char>(byte)); }
    TRITKIT_INLINE __m256i both(__m256i a, __m256i b) { return _mm256_and_si256(a, b); }
    TRITKIT_INLINE __m256i add(__m256i a, __m256i b) { return _mm256_add_epi8(a, b); }
    template <int n>
    TRITKIT_INLINE __m256i shift_right(__m256i v) {
        return _mm256_srli_epi32(v, n);
    }
    TRITKIT_INLINE __m256i trit(__m256i q) {  // 3 q >= 256, 3 q >= 512
        const __m256i one = splat(1);
        return add(_mm256_min_epu8(_mm256_subs_epu8(q, splat(85)), one),
                   _mm256_min_epu8(_mm256_subs_epu8(q, splat(170)), one));
    }
    TRITKIT_INLINE __m256i broadcast4(const int8_t* x, int field) {
        int32_t four;
        memcpy(&four, x + 4 * field, 4);
        return _mm256_set1_epi32(four);
    }

    template <int largest>
    TRITKIT_INLINE __m256i start(int32_t) {
        return _mm256_setzero_si256();
    }
    TRITKIT_INLINE __m256i splat32(int32_t value) { return _mm256_set1_epi32(value); }
    TRITKIT_INLINE __m256i plus(__m256i a, __m256i b) { return _mm256_add_epi32(a, b); }
    TRITKIT_INLINE __m256i minus(__m256i a, __m256i b) { return _mm256_sub_epi32(a, b); }
    TRITKIT_INLINE __m256i shift_left(__m256i v, int n) { return _mm256_sll_epi32(v, _mm_cvtsi32_si128(n)); }
    TRITKIT_INLINE __m256i shift_right32(__m256i v, int n) { return _mm256_sra_epi32(v, _mm_cvtsi32_si128(n)); }
    TRITKIT_INLINE __m256i load32(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    TRITKIT_INLINE void store(int32_t* p, __m256i v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }

    // --- For grouped weights: group_kernels.h says what each of these is for.
    using Floats = __m256;
    template <int n>
    TRITKIT_INLINE __m256i shift_left(__m256i v) {
        return _mm256_slli_epi32(v, n);
    }
    TRITKIT_INLINE __m256i merge(__m256i a, __m256i b, __m256i mask) {
        return _mm256_or_si256(a, _mm256_and_si256(b, mask));
    }
    TRITKIT_INLINE __m256i load_table(const uint8_t* p) {
        return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    TRITKIT_INLINE __m256i lookup(__m256i table, __m256i codes) { return _mm256_shuffle_epi8(table, codes); }
    TRITKIT_INLINE __m256 no_floats() { return _mm256_setzero_ps(); }
    TRITKIT_INLINE __m256 load_floats(const float* p) { return _mm256_loadu_ps(p); }
    TRITKIT_INLINE void store_floats(float* p, __m256 v) { _mm256_storeu_ps(p, v); }
    TRITKIT_INLINE __m256 splat_floats(float value) { return _mm256_set1_ps(value); }
    TRITKIT_INLINE __m256 to_floats(__m256i v) { return _mm256_cvtepi32_ps(v); }
    TRITKIT_INLINE __m128i eight_bytes(const uint8_t* p) {
        return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    }
    TRITKIT_INLINE __m256 halves(const uint8_t* p) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    TRITKIT_INLINE __m256 int8s(const uint8_t* p) { return to_floats(_mm256_cvtepi8_epi32(eight_bytes(p))); }
    TRITKIT_INLINE __m256 uint8s(const uint8_t* p) { return to_floats(_mm256_cvtepu8_epi32(eight_bytes(p))); }
    TRITKIT_INLINE __m256 nibbles(const uint8_t* p, int shift) {
        const __m256i bytes = _mm256_cvtepu8_epi32(eight_bytes(p));
        return to_floats(_mm256_and_si256(shift_right32(bytes, shift), _mm256_set1_epi32(15)));
    }
    TRITKIT_INLINE __m256 times(__m256 a, __m256 b) { return _mm256_mul_ps(a, b); }
    TRITKIT_INLINE __m256 subtract(__m256 a, __m256 b) { return _mm256_sub_ps(a, b); }
    TRITKIT_INLINE __m256 fma(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
};
