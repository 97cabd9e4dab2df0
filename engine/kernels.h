// The kernels: inner loops, written once for all instruction sets.
//
// model.h includes this file once for each instruction set. All of them compute sixteen values at a
// time, in the same order of operations, so that their results are equal to the last bit. The
// sixteen are PARTS vectors as wide as a register. With wider vectors, gcc 12 keeps them in memory,
// and its AVX2 code is up to ten times slower.
//
// needs:   model.h's types from Format to Kernels; KERNEL(name), which appends the set's suffix to a
//          name; for intrinsics, KERNEL_AVX2, KERNEL_AVX512, KERNEL_DOTPROD or KERNEL_SIMD128
// defines: kernels_<suffix>, the table of functions that forward() calls; undefines the macros at the
//          end, ready for the next set

// for each set: its name; the floats in a register (WIDTH); how many inputs int8 and int4 products
// process at a time (TILE); how many rows float products do with one input (ALONE), or with several
// (ROWS, INPUTS); how many parts of sixteen values attention does (AT_ONCE); whether activations are
// multiplied as high and low bytes instead of 16-bit integers (IN_BYTES), and then, whether by
// signed int8 weights
#if defined(KERNEL_AVX512)
#define NAME "AVX-512"
#define WIDTH 16
enum { KERNEL(TILE) = 8, KERNEL(ALONE) = 4, KERNEL(AT_ONCE) = 1 };
enum { KERNEL(ROWS) = 4, KERNEL(INPUTS) = 4 };
#define IN_BYTES 1
enum { KERNEL(IS_SIGNED) = 0 };
#elif defined(KERNEL_AVX2)
#define NAME "AVX2"
#define WIDTH 8
enum { KERNEL(TILE) = 4, KERNEL(ALONE) = 4, KERNEL(AT_ONCE) = 2 };
enum { KERNEL(ROWS) = 2, KERNEL(INPUTS) = 2 };
#define IN_BYTES 0
#elif defined(KERNEL_DOTPROD)
#define NAME "NEON dotprod"
#define WIDTH 4
enum { KERNEL(TILE) = 2, KERNEL(ALONE) = 4, KERNEL(AT_ONCE) = 4 };
enum { KERNEL(ROWS) = 2, KERNEL(INPUTS) = 2 };
#define IN_BYTES 1
enum { KERNEL(IS_SIGNED) = 1 };
#else
#if defined(KERNEL_SIMD128)
#define NAME "SIMD128"
#else
#define NAME "portable"
#endif
#define WIDTH 4
enum { KERNEL(TILE) = 1, KERNEL(ALONE) = 2, KERNEL(AT_ONCE) = 2 };
enum { KERNEL(ROWS) = 1, KERNEL(INPUTS) = 1 };
#define IN_BYTES 0
#endif
#define PARTS (LANES / WIDTH)
#define INLINE static inline __attribute__((always_inline))

typedef float KERNEL(Floats) __attribute__((vector_size(4 * WIDTH)));
typedef int32_t KERNEL(Ints) __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t KERNEL(Words) __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t KERNEL(Halves) __attribute__((vector_size(2 * WIDTH)));
typedef uint16_t KERNEL(Shorts) __attribute__((vector_size(4 * WIDTH)));
typedef int8_t KERNEL(Bytes) __attribute__((vector_size(WIDTH)));
#define Floats KERNEL(Floats)
#define Ints KERNEL(Ints)
#define Words KERNEL(Words)
#define Halves KERNEL(Halves)

INLINE Floats KERNEL(splat)(float x) { return (Floats){0} + x; }

INLINE Floats KERNEL(load)(const float *p) {
    Floats v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void KERNEL(store)(float *p, Floats v) { memcpy(p, &v, sizeof v); }

// Load bfloat16 values, the upper halves of float32.
INLINE Floats KERNEL(widen)(const uint16_t *p) {
#if defined(KERNEL_AVX512)
    __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p));
    return (Floats)_mm512_slli_epi32(words, 16);
#elif defined(KERNEL_AVX2)
    __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p));
    return (Floats)_mm256_slli_epi32(words, 16);
#elif defined(KERNEL_SIMD128)
    return (Floats)wasm_i32x4_shl(wasm_u32x4_load16x4(p), 16);
#else
    Halves h;
    memcpy(&h, p, sizeof h);
    return (Floats)(__builtin_convertvector(h, Words) << 16);
#endif
}

INLINE Floats KERNEL(load_as)(const void *p, size_t at, bool is_bf16) {
    return is_bf16 ? KERNEL(widen)((const uint16_t *)p + at) : KERNEL(load)((const float *)p + at);
}

// Load sixteen values into v (PARTS): the first n of p, and zeros if n is less than sixteen.
INLINE void KERNEL(load_sixteen)(Floats *v, const void *p, size_t n, bool is_bf16) {
    for (size_t j = 0, at = 0; j < PARTS; j++, at += WIDTH) {
        Floats padded[2] = {{0}};  // of bfloat16, the first half is used
        if (at + WIDTH > n && at < n) {
            size_t size = is_bf16 ? 2 : 4;
            memcpy(padded, (const char *)p + at * size, (n - at) * size);
            v[j] = KERNEL(load_as)(padded, 0, is_bf16);
        } else {
            v[j] = at < n ? KERNEL(load_as)(p, at, is_bf16) : padded[0];
        }
    }
}

INLINE Floats KERNEL(choose)(Ints mask, Floats a, Floats b) {
    return (Floats)((mask & (Ints)a) | (~mask & (Ints)b));
}

// The sum of sixteen values (PARTS): add one half to the other until one value is left.
INLINE float KERNEL(sum)(const Floats *v) {
#if defined(KERNEL_AVX512)
    return _mm512_reduce_add_ps((__m512)*v);
#else
    Floats part[PARTS];
    float x[WIDTH];
    memcpy(part, v, sizeof part);
    for (int n = PARTS / 2; n; n /= 2)
        for (int i = 0; i < n; i++) part[i] += part[i + n];
    KERNEL(store)(x, part[0]);
    for (int n = WIDTH / 2; n; n /= 2)
        for (int i = 0; i < n; i++) x[i] += x[i + n];
    return x[0];
#endif
}

// The sums of four times sixteen values (4, PARTS), each in the same order as in sum().
INLINE void KERNEL(sum_four)(float *out, const Floats *v) {
#if defined(KERNEL_AVX512)
    __m512 s[] = {(__m512)v[0], (__m512)v[1], (__m512)v[2], (__m512)v[3]};
    for (int i = 0; i < 4; i += 2)
        s[i] = _mm512_add_ps(_mm512_shuffle_f32x4(s[i], s[i + 1], 0x44),
                             _mm512_shuffle_f32x4(s[i], s[i + 1], 0xEE));
    s[0] = _mm512_add_ps(_mm512_shuffle_f32x4(s[0], s[2], 0x88),
                         _mm512_shuffle_f32x4(s[0], s[2], 0xDD));
    s[0] = _mm512_add_ps(s[0], _mm512_shuffle_ps(s[0], s[0], 0x4E));
    s[0] = _mm512_add_ps(s[0], _mm512_shuffle_ps(s[0], s[0], 0xB1));
    _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, s[0])));
#elif defined(KERNEL_AVX2)
    __m128 s[4];
    for (int i = 0; i < 4; i++) {
        __m256 all = _mm256_add_ps((__m256)v[2 * i], (__m256)v[2 * i + 1]);
        s[i] = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
    }
    __m128 ab = _mm_add_ps(_mm_unpacklo_ps(s[0], s[1]), _mm_unpackhi_ps(s[0], s[1]));
    __m128 cd = _mm_add_ps(_mm_unpacklo_ps(s[2], s[3]), _mm_unpackhi_ps(s[2], s[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab)));
#else
    for (int i = 0; i < 4; i++) out[i] = KERNEL(sum)(v + i * PARTS);
#endif
}

INLINE float KERNEL(largest)(Floats v) {
#if defined(KERNEL_AVX512)
    return _mm512_reduce_max_ps((__m512)v);
#else
    float x[WIDTH];
    KERNEL(store)(x, v);
    for (int n = WIDTH / 2; n; n /= 2)
        for (int i = 0; i < n; i++) x[i] = x[i] > x[i + n] ? x[i] : x[i + n];
    return x[0];
#endif
}

// e^x to about 2 units in the last place; 0 below -87, e^88 above 88. Range reduction by ln 2 in
// two parts and a polynomial, as in Cephes (Moshier 1992); unlike libm, the same bits everywhere.
INLINE Floats KERNEL(exp)(Floats x) {
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    Ints is_tiny = x < -87.0f;
    x = KERNEL(choose)(x > 88.0f, KERNEL(splat)(88.0f), x);
    x = KERNEL(choose)(is_tiny, KERNEL(splat)(0.0f), x);
    Floats shifted = x * 1.44269504f + magic, n = shifted - magic;
    Floats r = x - n * 0.693359375f - n * -2.12194440e-4f;
    Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    Words power = ((Words)shifted - (Words)KERNEL(splat)(magic) + 127) << 23;
    return KERNEL(choose)(is_tiny, KERNEL(splat)(0.0f), p * (Floats)power);
}

// out = x / rms(x) * gain (n); NULL: no gain.
static void KERNEL(rmsnorm)(float *out, const float *x, const float *gain, size_t n, float eps) {
    Floats squares[PARTS] = {{0}};
    for (size_t i = 0; i < n; i += LANES) {
        Floats v[PARTS];
        KERNEL(load_sixteen)(v, x + i, n - i, false);
        for (size_t j = 0; j < PARTS; j++) squares[j] += v[j] * v[j];
    }
    float scale = 1.0f / sqrtf(KERNEL(sum)(squares) / (float)n + eps);
    if (gain) {
        for (size_t i = 0; i < n; i++) out[i] = gain[i] * (scale * x[i]);
    } else {
        for (size_t i = 0; i < n; i++) out[i] = scale * x[i];
    }
}

// h (n) = silu(h) * up, or relu(h)^2. h and up have room for sixteen values at a time.
static void KERNEL(activate)(Activation kind, float *h, const float *up, size_t n) {
    for (size_t i = 0; i < ROUND_UP(n, LANES); i += WIDTH) {
        Floats v = KERNEL(load)(h + i);
        if (kind == SWIGLU) v = v / (1.0f + KERNEL(exp)(-v)) * KERNEL(load)(up + i);
        else v = KERNEL(choose)(v > 0.0f, v * v, KERNEL(splat)(0.0f));
        KERNEL(store)(h + i, v);
    }
}

// The index of the largest of x (n), the first if several are equal.
static size_t KERNEL(argmax)(const float *x, size_t n) {
    Floats maxima = KERNEL(splat)(-INFINITY);
    Ints here = {0}, places;
    for (int i = 0; i < WIDTH; i++) here[i] = i;
    places = here;
    size_t whole = n / WIDTH * WIDTH, best = 0;
    for (size_t i = 0; i < whole; i += WIDTH, here += WIDTH) {
        Floats v = KERNEL(load)(x + i);
        Ints is_larger = v > maxima;
        maxima = KERNEL(choose)(is_larger, v, maxima);
        places = (is_larger & here) | (~is_larger & places);
    }
    float max = -INFINITY;
    for (size_t i = 0; i < WIDTH && whole; i++) {
        size_t place = (size_t)places[i];
        if (maxima[i] > max || (maxima[i] == max && place < best)) best = place;
        max = maxima[i] > max ? maxima[i] : max;
    }
    for (size_t i = whole; i < n; i++) {
        if (x[i] > max) best = i;
        max = x[i] > max ? x[i] : max;
    }
    return best;
}

// x = softmax(x / temperature) (n)
static void KERNEL(softmax)(float *x, size_t n, float temperature) {
    float max = x[KERNEL(argmax)(x, n)], inverse = 1.0f / temperature;
    inverse = inverse < 1e38f ? inverse : 1e38f;  // 0 * infinity would be NaN
    Floats sums[PARTS] = {{0}};
    for (size_t i = 0; i < n; i += LANES) {
        Floats v[PARTS];
        KERNEL(load_sixteen)(v, x + i, n - i, false);
        for (size_t j = 0; j < PARTS; j++) v[j] = KERNEL(exp)((v[j] - max) * inverse);
        if (n - i < LANES) {  // only zeros follow the last value
            memcpy(x + i, v, (n - i) * sizeof *x);
            KERNEL(load_sixteen)(v, x + i, n - i, false);
        }
        for (size_t j = 0; j < PARTS; j++) {
            if (n - i >= LANES) KERNEL(store)(x + i + j * WIDTH, v[j]);
            sums[j] += v[j];
        }
    }
    float share = 1.0f / KERNEL(sum)(sums);
    for (size_t i = 0; i < n; i++) x[i] *= share;
}

// x = cap * tanh(x / cap) (n), with room for sixteen values at a time
static void KERNEL(softcap)(float *x, size_t n, float cap) {
    for (size_t i = 0; i < ROUND_UP(n, LANES); i += WIDTH) {
        Floats v = KERNEL(load)(x + i) * (2.0f / cap);
        v = KERNEL(choose)(v < -80.0f, KERNEL(splat)(-80.0f), v);
        KERNEL(store)(x + i, cap - 2.0f * cap / (KERNEL(exp)(v) + 1.0f));
    }
}

// sigmoid(a . b), both (n)
static float KERNEL(smear_gate)(const float *a, const float *b, size_t n) {
    Floats sums[PARTS] = {{0}};
    for (size_t i = 0; i < n; i += LANES) {
        Floats va[PARTS], vb[PARTS];
        KERNEL(load_sixteen)(va, a + i, n - i, false);
        KERNEL(load_sixteen)(vb, b + i, n - i, false);
        for (size_t j = 0; j < PARTS; j++) sums[j] += va[j] * vb[j];
    }
    return 1.0f / (1.0f + KERNEL(exp)(KERNEL(splat)(-KERNEL(sum)(sums)))[0]);
}

// Read n bytes in a pattern, to measure the speed of the memory.
static void KERNEL(read)(const uint8_t *data, size_t n, Pattern pattern) {
    Words sums[8] = {{0}};
    const bool in_streams = pattern == EIGHT_STREAMS;
    const size_t apart = in_streams ? n / sizeof sums * sizeof *sums : sizeof *sums;
    const size_t step = in_streams ? sizeof *sums : sizeof sums, end = in_streams ? apart : n;
    for (size_t i = 0; i + step <= end; i += step) {
        for (size_t j = 0; j < 8; j++) {
            Words w;
            memcpy(&w, data + i + j * apart, sizeof w);
            sums[j] += w;
        }
        for (size_t line = 0; pattern == PREFETCHED && line < step; line += 64)
            __builtin_prefetch(data + i + 4096 + line);
    }
    for (int j = 1; j < 8; j++) sums[0] += sums[j];
    volatile uint32_t kept = sums[0][0];
    (void)kept;
}

// Write the integers of a vector to a row of an input, each four `step` bytes after the last: as
// 16-bit integers in the order 0, 2, 1, 3, or as four high and four low bytes. Returns where the next
// ones go.
INLINE int8_t *KERNEL(store_codes)(int8_t *at, Ints v, size_t step) {
#if IN_BYTES
    KERNEL(Bytes) high = __builtin_convertvector((v + 128) >> 8, KERNEL(Bytes));
    KERNEL(Bytes) low = __builtin_convertvector(v, KERNEL(Bytes));
    for (size_t quad = 0; quad < WIDTH / 4; quad++, at += step) {
        memcpy(at, (char *)&high + 4 * quad, 4);
        memcpy(at + 4, (char *)&low + 4 * quad, 4);
    }
    return at;
#elif defined(KERNEL_AVX2)
    v = (Ints)_mm256_shuffle_epi32((__m256i)v, 0xD8);
    __m256i codes = _mm256_packs_epi32((__m256i)v, (__m256i)v);
    _mm_storel_epi64((void *)at, _mm256_castsi256_si128(codes));
    _mm_storel_epi64((void *)(at + step), _mm256_extracti128_si256(codes, 1));
    return at + 2 * step;
#elif defined(KERNEL_SIMD128)
    v128_t codes = wasm_i32x4_shuffle((v128_t)v, (v128_t)v, 0, 2, 1, 3);
    wasm_v128_store64_lane(at, wasm_i16x8_narrow_i32x4(codes, codes), 0);
    return at + step;
#else
    int16_t codes[4] = {(int16_t)v[0], (int16_t)v[2], (int16_t)v[1], (int16_t)v[3]};
    memcpy(at, codes, sizeof codes);
    return at + step;
#endif
}

// Quantize a row of an input to 16-bit integers; a group of columns shares a scale. Zeros follow
// the last column, up to sixteen. NaN becomes 0.
static void KERNEL(quantize)(Input *in, size_t row, size_t n, size_t group, int zero) {
    const float magic = 12582912.0f, *x = in->x + row * in->stride;
    const size_t step = 8 * in->tile;
    const bool is_8bit = in->is_8bit;
    int8_t *at = codes_at(in, row, 0);
    for (size_t g = 0; g * group < n; g++) {
        size_t first = g * group, end = first + group < n ? first + group : ROUND_UP(n, LANES);
        Floats maxima = {0};
        for (size_t i = first; i < end; i += WIDTH) {
            Floats v = (Floats)((Ints)KERNEL(load)(x + i) & 0x7FFFFFFF);
            maxima = KERNEL(choose)(v > maxima, v, maxima);
        }
        float scale = KERNEL(largest)(maxima) / (127 * 256);
        float inverse = scale > 1e-37f ? 1.0f / scale : 0.0f;  // finite
        Words sum = {0};
        for (size_t i = first; i < end; i += WIDTH) {
            Floats scaled = KERNEL(load)(x + i) * inverse;
            Ints is_number = (scaled > -32768.0f) & (scaled < 32768.0f);
            scaled = KERNEL(choose)(is_number, scaled, KERNEL(splat)(0.0f));
            Ints v = (Ints)(scaled + magic) - (Ints)KERNEL(splat)(magic);
            if (is_8bit) v = (v + 128) & -256;
            at = KERNEL(store_codes)(at, v, step);
            sum += (Words)v;
        }
        uint32_t total = 0;
        for (int i = 0; i < WIDTH; i++) total += sum[i];
        in->scales[row * in->max_groups + g] = scale;
        in->offsets[row * in->max_groups + g] = (int32_t)(total * (uint32_t)-zero);
    }
}

// ---- products of int8 and int4: sums of `group` columns are integers and exact

#if IN_BYTES

// sums[lane] += w[lane] . x, four products per lane: w has weights from 0 to 255, x the same four
// values for all lanes.
INLINE Ints KERNEL(dot4)(Ints sums, Words w, const int8_t *quad, bool is_4bit) {
    int32_t x;
    memcpy(&x, quad, sizeof x);
#if defined(KERNEL_AVX512)
    (void)is_4bit;
    return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)w, _mm512_set1_epi32(x));
#else
    int8x16_t codes = is_4bit ? (int8x16_t)w : veorq_s8((int8x16_t)w, vdupq_n_s8(-128));
    return (Ints)vdotq_s32((int32x4_t)sums, codes, vreinterpretq_s8_s32(vdupq_n_s32(x)));
#endif
}

// Multiply n_blocks blocks of sixteen rows of int8 or int4, each `apart` blocks after the one before,
// by n inputs from t on. Callers pass constants as n_blocks and n, so that the sums stay in registers
// after inlining.
INLINE void KERNEL(tile_of_codes)(const Product *p, size_t block, size_t apart, size_t t,
                                  const size_t n_blocks, const size_t n, const bool is_4bit,
                                  const bool has_low) {
    const Tensor *w = p->w;
    const Input *in = p->in;
    const size_t group = w->group, groups = (w->cols + group - 1) / group;
    const size_t per_vector = is_4bit ? 8 : 4;  // columns of sixteen rows in CODES bytes
    const size_t vectors = (w->cols + per_vector - 1) / per_vector;
    const uint8_t *codes = w->data + block * vectors * CODES;
    const int8_t *x = codes_at(in, t, 0);
    const size_t step = 8 * in->tile, next_block = apart * vectors * CODES;
    // prefetch the next two blocks: tiles of inputs alternate between them; a single tile fetches
    // both. A single input fetches what follows each of its blocks.
    const size_t ahead = in->n == 1 || n_blocks == 1 ? 4096 : (2 + t / n % 2) * next_block;
    const bool is_only = in->n < 2 * n;
    Floats out[2][TILE][PARTS];
    for (size_t b = 0; b < n_blocks; b++)
        for (size_t i = 0; i < n; i++)
            for (size_t j = 0; j < PARTS; j++) out[b][i][j] = KERNEL(splat)(0.0f);
    size_t v = 0;
    for (size_t g = 0; g < groups; g++) {
        Ints high[2][TILE][PARTS], low[2][TILE][PARTS];
        for (size_t i = 0; i < n; i++) {
            int32_t offset = in->offsets[(t + i) * in->max_groups + g];
            if (!is_4bit && KERNEL(IS_SIGNED)) offset = 0;
            for (size_t b = 0; b < n_blocks; b++)
                for (size_t j = 0; j < PARTS; j++) {
                    low[b][i][j] = (Ints){0} + offset;
                    high[b][i][j] = (Ints){0};
                }
        }
        size_t end = (g + 1) * group / per_vector;
        if (end > vectors) end = vectors;
        for (; v < end; v++, codes += CODES) {
            Words c[2][PARTS];
            for (size_t b = 0; b < n_blocks; b++) {
                for (size_t j = 0; j < PARTS; j++)
                    memcpy(&c[b][j], codes + b * next_block + j * sizeof c[b][j], sizeof c[b][j]);
                if (b == 0 || is_only) __builtin_prefetch(codes + b * next_block + ahead);
            }
            for (size_t half = 0; half < (is_4bit ? 2 : 1); half++, x += step)
                for (size_t b = 0; b < n_blocks; b++)
                    for (size_t j = 0; j < PARTS; j++) {
                        Words four = half ? c[b][j] >> 4 : c[b][j];
                        if (is_4bit) four &= 0x0F0F0F0F;
                        for (size_t i = 0; i < n; i++) {
                            const int8_t *at = x + 8 * i;
                            high[b][i][j] = KERNEL(dot4)(high[b][i][j], four, at, is_4bit);
                            if (has_low)
                                low[b][i][j] = KERNEL(dot4)(low[b][i][j], four, at + 4, is_4bit);
                        }
                    }
        }
        for (size_t b = 0; b < n_blocks; b++)
            for (size_t j = 0; j < PARTS; j++) {
                size_t scale_at = ((block + b * apart) * groups + g) * LANES + j * WIDTH;
                Floats scale = KERNEL(load_as)(w->scales, scale_at, !w->wide_scales);
                for (size_t i = 0; i < n; i++) {
                    float x_scale = in->scales[(t + i) * in->max_groups + g];
                    Ints sum = (Ints)((Words)high[b][i][j] * 256 + (Words)low[b][i][j]);
                    out[b][i][j] += __builtin_convertvector(sum, Floats) * (scale * x_scale);
                }
            }
    }
    for (size_t b = 0; b < n_blocks; b++)
        for (size_t i = 0; i < n; i++)
            memcpy(p->out + (t + i) * p->stride + (block + b * apart) * LANES, out[b][i],
                   sizeof out[b][i]);
}

#else

// sums[lane] += w[lane] . x, four products per lane: columns 0 and 2 of the weights (from 0 to 255)
// are 16-bit integers in `even` and columns 1 and 3 in `odd`; x is in the order 0, 2, 1, 3.
// x86-64 always has SSE2 and 64-bit ARM has NEON, which gcc does not use for the plain code.
INLINE Words KERNEL(dot4)(Words sums, Words even, Words odd, const int8_t *quad) {
    int32_t first, second;  // two loads: from an array, gcc 12 makes one load and shifts
    memcpy(&first, quad, 4);
    memcpy(&second, quad + 4, 4);
#if defined(KERNEL_AVX2)
    sums += (Words)_mm256_madd_epi16((__m256i)even, _mm256_set1_epi32(first));
    return sums + (Words)_mm256_madd_epi16((__m256i)odd, _mm256_set1_epi32(second));
#elif defined(KERNEL_SIMD128)
    sums += (Words)wasm_i32x4_dot_i16x8((v128_t)even, wasm_i32x4_splat(first));
    return sums + (Words)wasm_i32x4_dot_i16x8((v128_t)odd, wasm_i32x4_splat(second));
#elif defined(__x86_64__)
    sums += (Words)_mm_madd_epi16((__m128i)even, _mm_set1_epi32(first));
    return sums + (Words)_mm_madd_epi16((__m128i)odd, _mm_set1_epi32(second));
#elif defined(__aarch64__)
    int16x8_t e = (int16x8_t)even, x = vreinterpretq_s16_s32(vdupq_n_s32(first));
    int16x8_t o = (int16x8_t)odd, y = vreinterpretq_s16_s32(vdupq_n_s32(second));
    int32x4_t low = vmull_s16(vget_low_s16(e), vget_low_s16(x)), high = vmull_high_s16(e, x);
    low = vmlal_s16(low, vget_low_s16(o), vget_low_s16(y));
    high = vmlal_high_s16(high, o, y);
    return sums + (Words)vpaddq_s32(low, high);
#else
    sums += (even & 255) * (uint32_t)(int16_t)first + (even >> 16) * (uint32_t)(first >> 16);
    return sums + (odd & 255) * (uint32_t)(int16_t)second + (odd >> 16) * (uint32_t)(second >> 16);
#endif
}

// Multiply a block of sixteen rows of int8 or int4 by n inputs from t on. Callers pass a constant
// as n, so that the sums stay in registers after inlining.
INLINE void KERNEL(tile_of_codes)(const Product *p, size_t block, size_t t, const size_t n,
                                  const bool is_4bit) {
    enum { N = KERNEL(TILE) };
    const Tensor *w = p->w;
    const Input *in = p->in;
    const size_t group = w->group, groups = (w->cols + group - 1) / group;
    const size_t per_vector = is_4bit ? 8 : 4;  // columns of sixteen rows in CODES bytes
    const size_t vectors = (w->cols + per_vector - 1) / per_vector, step = 8 * in->tile;
    const uint8_t *codes = w->data + block * vectors * CODES;
    const int8_t *x = codes_at(in, t, 0);
    Floats out[N][PARTS];
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < PARTS; j++) out[i][j] = KERNEL(splat)(0.0f);
    size_t v = 0;
    for (size_t g = 0; g < groups; g++) {
        Words sums[N][PARTS];
        for (size_t i = 0; i < n; i++)
            for (size_t j = 0; j < PARTS; j++)
                sums[i][j] = (Words){0} + (uint32_t)in->offsets[(t + i) * in->max_groups + g];
        size_t end = (g + 1) * group / per_vector;
        if (end > vectors) end = vectors;
        for (; v < end; v++, codes += CODES) {
            Words c[PARTS];
            for (size_t j = 0; j < PARTS; j++) memcpy(&c[j], codes + j * sizeof *c, sizeof *c);
            __builtin_prefetch(codes + 4096);
            for (size_t half = 0; half < (is_4bit ? 2 : 1); half++, x += step) {
                Words even[PARTS], odd[PARTS];
                UNROLL
                for (size_t j = 0; j < PARTS; j++) {
                    Words four = half ? c[j] >> 4 : c[j];
                    if (is_4bit) four &= 0x0F0F0F0F;
                    even[j] = four & 0x00FF00FF;
                    odd[j] = (Words)((KERNEL(Shorts))four >> 8);
                }
                for (size_t i = 0; i < n; i++) {
                    UNROLL
                    for (size_t j = 0; j < PARTS; j++)
                        sums[i][j] = KERNEL(dot4)(sums[i][j], even[j], odd[j], x + 8 * i);
                }
            }
        }
        for (size_t j = 0; j < PARTS; j++) {
            size_t scale_at = (block * groups + g) * LANES + j * WIDTH;
            Floats scale = KERNEL(load_as)(w->scales, scale_at, !w->wide_scales);
            for (size_t i = 0; i < n; i++) {
                float x_scale = in->scales[(t + i) * in->max_groups + g];
                out[i][j] += __builtin_convertvector((Ints)sums[i][j], Floats) * (scale * x_scale);
            }
        }
    }
    for (size_t i = 0; i < n; i++)
        memcpy(p->out + (t + i) * p->stride + block * LANES, out[i], sizeof out[i]);
}

#endif

// Multiply blocks first to last (exclusive) of int8 or int4 by all inputs.
INLINE void KERNEL(codes)(const Product *p, size_t first, size_t last, const bool is_4bit,
                          const bool has_low) {
    enum { N = KERNEL(TILE) };
    const size_t n = p->in->n;
    size_t block = first;
#if IN_BYTES
    const size_t tile = has_low ? N / 2 : N;
    if (n == 1) {  // memory is read faster as two streams, from both halves of the blocks
        size_t half = (last - first) / 2;
        for (; block < first + half; block++)
            KERNEL(tile_of_codes)(p, block, half, 0, 2, 1, is_4bit, has_low);
        block += half;
    }
    // with enough registers, two blocks share each load of an input
    for (; N > 2 && n > 1 && block + 2 <= last; block += 2) {
        size_t t = 0;
        for (; t + tile <= n; t += tile)
            KERNEL(tile_of_codes)(p, block, 1, t, 2, tile, is_4bit, has_low);
        for (; t + 2 <= n; t += 2) KERNEL(tile_of_codes)(p, block, 1, t, 2, 2, is_4bit, has_low);
        for (; t < n; t++) KERNEL(tile_of_codes)(p, block, 1, t, 2, 1, is_4bit, has_low);
    }
    for (; block < last; block++) {
        size_t t = 0;
        for (; t + N <= n; t += N) KERNEL(tile_of_codes)(p, block, 1, t, 1, N, is_4bit, has_low);
        for (; N > 2 && t + 2 <= n; t += 2)
            KERNEL(tile_of_codes)(p, block, 1, t, 1, 2, is_4bit, has_low);
        for (; t < n; t++) KERNEL(tile_of_codes)(p, block, 1, t, 1, 1, is_4bit, has_low);
    }
#else
    (void)has_low;  // 8-bit activations have a low half of 0
    for (; block < last; block++) {
        size_t t = 0;
        for (; t + N <= n; t += N) KERNEL(tile_of_codes)(p, block, t, N, is_4bit);
        for (; t < n; t++) KERNEL(tile_of_codes)(p, block, t, 1, is_4bit);
    }
#endif
}

// ---- products of float32 and bfloat16

// Multiply n_rows rows by n inputs from t on. Callers pass constants as n_rows and n.
INLINE void KERNEL(rows_of_floats)(const Product *p, size_t row, size_t t, const size_t n_rows,
                                   const size_t n, const bool is_bf16) {
    const Tensor *w = p->w;
    const size_t cols = w->cols, whole = cols / LANES * LANES, stride = p->in->stride;
    const float *x = p->in->x + t * stride;
    Floats sums[KERNEL(INPUTS)][KERNEL(ALONE)][PARTS];
    for (size_t i = 0; i < n; i++)
        for (size_t r = 0; r < n_rows; r++)
            for (size_t j = 0; j < PARTS; j++) sums[i][r][j] = KERNEL(splat)(0.0f);
    // with one input, the next rows are fetched in the order of memory: it reads one stream faster
    // than several
    const size_t size = is_bf16 ? 2 : 4, ahead = n_rows * LANES * size;
    const uint8_t *next = w->data + (row + n_rows) * cols * size;
    for (size_t c = 0; c < whole; c += LANES, next += ahead) {
        for (size_t line = 0; n == 1 && line < ahead; line += 64) __builtin_prefetch(next + line);
        for (size_t j = 0; j < PARTS; j++) {
            Floats v[KERNEL(INPUTS)];
            size_t at = row * cols + c + j * WIDTH;
            for (size_t i = 0; i < n; i++) v[i] = KERNEL(load)(x + i * stride + c + j * WIDTH);
            for (size_t r = 0; r < n_rows; r++, at += cols) {
                Floats weights = KERNEL(load_as)(w->data, at, is_bf16);
                for (size_t i = 0; i < n; i++) sums[i][r][j] += weights * v[i];
            }
        }
    }
    for (size_t r = 0; whole < cols && r < n_rows; r++) {
        Floats weights[PARTS];
        size_t at = ((row + r) * cols + whole) * size;
        KERNEL(load_sixteen)(weights, w->data + at, cols - whole, is_bf16);
        for (size_t i = 0; i < n; i++)
            for (size_t j = 0; j < PARTS; j++)
                sums[i][r][j] += weights[j] * KERNEL(load)(x + i * stride + whole + j * WIDTH);
    }
    for (size_t i = 0; i < n; i++) {
        float *out = p->out + (t + i) * p->stride + row;
        size_t r = 0;
        for (; r + 4 <= n_rows; r += 4) KERNEL(sum_four)(out + r, sums[i][r]);
        for (; r < n_rows; r++) out[r] = KERNEL(sum)(sums[i][r]);
    }
}

// Multiply rows `row` to end (exclusive) of float32 or bfloat16 by all inputs.
INLINE void KERNEL(block_of_floats)(const Product *p, size_t row, size_t end, const bool is_bf16) {
    enum { ALONE = KERNEL(ALONE), ROWS = KERNEL(ROWS), INPUTS = KERNEL(INPUTS) };
    const size_t n = p->in->n;
    size_t t = 0;
    for (; INPUTS > 1 && t + INPUTS <= n; t += INPUTS) {
        size_t r = row;
        for (; r + ROWS <= end; r += ROWS) KERNEL(rows_of_floats)(p, r, t, ROWS, INPUTS, is_bf16);
        for (; r < end; r++) KERNEL(rows_of_floats)(p, r, t, 1, INPUTS, is_bf16);
    }
    for (; t < n; t++) {
        size_t r = row;
        for (; r + ALONE <= end; r += ALONE) KERNEL(rows_of_floats)(p, r, t, ALONE, 1, is_bf16);
        for (; r < end; r++) KERNEL(rows_of_floats)(p, r, t, 1, 1, is_bf16);
    }
}

// Compute blocks first to last (exclusive) of sixteen rows of a product, for all its inputs.
static void KERNEL(matmul)(const Product *p, size_t first, size_t last) {
    const Tensor *w = p->w;
    const bool has_low = !p->in->is_8bit;
    if (w->format == INT8 && has_low) KERNEL(codes)(p, first, last, false, true);
    else if (w->format == INT8) KERNEL(codes)(p, first, last, false, false);
    else if (w->format == INT4 && has_low) KERNEL(codes)(p, first, last, true, true);
    else if (w->format == INT4) KERNEL(codes)(p, first, last, true, false);
    for (size_t row = first * LANES; !w->group && row < last * LANES; row += LANES) {
        size_t end = row + LANES < w->rows ? row + LANES : w->rows;
        if (w->format == FP32) KERNEL(block_of_floats)(p, row, end, false);
        else KERNEL(block_of_floats)(p, row, end, true);
    }
}

// Attention of one query head q (head_dim) over the cached positions first to last (inclusive).
// out (head_dim) has room for sixteen values at a time. The softmax is online (Milakov & Gimelshein
// 2018), one chunk of positions at a time: a new largest score scales down the sums.
static void KERNEL(attend)(float *out, const float *q, const void *keys, const void *values,
                           size_t head_dim, size_t first, size_t last, bool is_bf16) {
    enum { CHUNK = 8, AT_ONCE = KERNEL(AT_ONCE) };  // CHUNK: sixteens of positions
    const size_t width = ROUND_UP(head_dim, LANES), end = last / LANES + 1;
    const float scale = 1.0f / sqrtf((float)head_dim);
    const Floats masked = KERNEL(splat)(-INFINITY);
    Ints lanes = {0};
    for (int i = 0; i < WIDTH; i++) lanes[i] = i;
    float max = -INFINITY, weights[CHUNK * LANES];
    Floats sums[PARTS] = {{0}}, scores[CHUNK][PARTS];
    memset(out, 0, width * sizeof *out);
    for (size_t start = first / LANES, n; start < end; start += n) {
        n = end - start < CHUNK ? end - start : CHUNK;
        Floats maxima = masked;
        for (size_t b = 0; b < n; b++)
            for (size_t part = 0; part < PARTS; part += AT_ONCE) {
                Floats s[AT_ONCE][4] = {{{0}}};
                size_t at = (start + b) * head_dim * LANES + part * WIDTH, d = 0;
                for (; d + 4 <= head_dim; d += 4)
                    for (size_t i = 0; i < 4; i++, at += LANES)
                        for (size_t j = 0; j < AT_ONCE; j++)
                            s[j][i] += q[d + i] * KERNEL(load_as)(keys, at + j * WIDTH, is_bf16);
                for (; d < head_dim; d++, at += LANES)
                    for (size_t j = 0; j < AT_ONCE; j++)
                        s[j][0] += q[d] * KERNEL(load_as)(keys, at + j * WIDTH, is_bf16);
                for (size_t j = 0; j < AT_ONCE; j++) {
                    Floats score = ((s[j][0] + s[j][1]) + (s[j][2] + s[j][3])) * scale;
                    Ints place = lanes + (int32_t)((start + b) * LANES + (part + j) * WIDTH);
                    Ints is_in = (place >= (int32_t)first) & (place <= (int32_t)last);
                    score = KERNEL(choose)(is_in, score, masked);
                    maxima = KERNEL(choose)(score > maxima, score, maxima);
                    scores[b][part + j] = score;
                }
            }
        float new_max = KERNEL(largest)(maxima);
        if (new_max > max) {
            float factor = KERNEL(exp)(KERNEL(splat)(max - new_max))[0];
            for (size_t d = 0; d < width; d++) out[d] *= factor;
            for (size_t j = 0; j < PARTS; j++) sums[j] *= factor;
            max = new_max;
        }
        for (size_t b = 0; b < n; b++)
            for (size_t j = 0; j < PARTS; j++) {
                Floats e = KERNEL(exp)(scores[b][j] - max);
                KERNEL(store)(weights + b * LANES + j * WIDTH, e);
                sums[j] += e;
            }
        for (size_t d = 0; d < head_dim; d += AT_ONCE * WIDTH) {  // masked positions have weight 0
            Floats y[AT_ONCE][4] = {{{0}}};
            size_t at = start * LANES * width + d;
            for (size_t i = 0; i < n * LANES; i += 4)
                for (size_t k = 0; k < 4; k++, at += width)
                    for (size_t j = 0; j < AT_ONCE; j++)
                        y[j][k] += weights[i + k] *
                                   KERNEL(load_as)(values, at + j * WIDTH, is_bf16);
            for (size_t j = 0; j < AT_ONCE; j++) {
                float *o = out + d + j * WIDTH;
                KERNEL(store)(o, KERNEL(load)(o) + ((y[j][0] + y[j][1]) + (y[j][2] + y[j][3])));
            }
        }
    }
    float sum = KERNEL(sum)(sums);
    for (size_t d = 0; d < width; d++) out[d] /= sum;
}

static const Kernels KERNEL(kernels) = {
    .name = NAME,
    .rmsnorm = KERNEL(rmsnorm), .activate = KERNEL(activate), .argmax = KERNEL(argmax),
    .softmax = KERNEL(softmax),
    .softcap = KERNEL(softcap), .smear_gate = KERNEL(smear_gate), .read = KERNEL(read),
    .quantize = KERNEL(quantize), .matmul = KERNEL(matmul), .attend = KERNEL(attend),
};

#undef Floats
#undef Ints
#undef Words
#undef Halves
#undef PARTS
#undef WIDTH
#undef IN_BYTES
#undef NAME
#undef INLINE
#undef KERNEL
#undef KERNEL_AVX2
#undef KERNEL_AVX512
#undef KERNEL_DOTPROD
#undef KERNEL_SIMD128
