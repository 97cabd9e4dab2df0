// The kernels of run.c: its inner loops, written once for all instruction sets.
//
// run.c includes this file once for each instruction set. All of them compute sixteen values at a
// time, in the same order of operations, so that their results are equal to the last bit.
//
// needs:   run.c's types from Format to Kernels; KERNEL(name), which appends the set's suffix to a
//          name; for intrinsics, KERNEL_AVX2, KERNEL_AVX512 or KERNEL_DOTPROD
// defines: kernels_<suffix>, the table of functions that run.c calls; undefines the macros at the
//          end, ready for the next set

// for each set: its name, how many inputs its products process at a time, and whether its int8
// products use signed weights
#if defined(KERNEL_AVX512)
enum { KERNEL(TILE) = 8, KERNEL(IS_SIGNED) = 0 };
#define NAME "AVX-512"
#elif defined(KERNEL_AVX2)
enum { KERNEL(TILE) = 2, KERNEL(IS_SIGNED) = 1 };
#define NAME "AVX2"
#elif defined(KERNEL_DOTPROD)
enum { KERNEL(TILE) = 2, KERNEL(IS_SIGNED) = 1 };
#define NAME "NEON dotprod"
#else
enum { KERNEL(TILE) = 1, KERNEL(IS_SIGNED) = 0 };
#define NAME "portable"
#endif
#define INLINE static inline __attribute__((always_inline))

INLINE Floats KERNEL(splat)(float x) { return (Floats){0} + x; }

INLINE Floats KERNEL(load)(const float *p) {
    Floats v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void KERNEL(store)(float *p, Floats v) { memcpy(p, &v, sizeof v); }

// Load sixteen bfloat16 values, the upper halves of float32.
INLINE Floats KERNEL(widen)(const uint16_t *p) {
    Halves h;
    memcpy(&h, p, sizeof h);
#if defined(KERNEL_AVX512)
    return (Floats)((Words)_mm512_cvtepu16_epi32((__m256i)h) << 16);
#else
    return (Floats)(__builtin_convertvector(h, Words) << 16);
#endif
}

INLINE Floats KERNEL(load_as)(const void *p, size_t at, bool is_bf16) {
    return is_bf16 ? KERNEL(widen)((const uint16_t *)p + at) : KERNEL(load)((const float *)p + at);
}

// Load the first n of sixteen values, followed by zeros.
INLINE Floats KERNEL(load_part)(const void *p, size_t at, size_t n, bool is_bf16) {
#if defined(KERNEL_AVX512)
    __mmask16 mask = (__mmask16)((1u << n) - 1);
    if (is_bf16) {
        __m256i half = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)p + at);
        return (Floats)((Words)_mm512_cvtepu16_epi32(half) << 16);
    }
    return (Floats)_mm512_maskz_loadu_ps(mask, (const float *)p + at);
#else
    float whole[LANES] = {0};
    uint16_t half[LANES] = {0};
    if (is_bf16) memcpy(half, (const uint16_t *)p + at, n * sizeof *half);
    else memcpy(whole, (const float *)p + at, n * sizeof *whole);
    return is_bf16 ? KERNEL(widen)(half) : KERNEL(load)(whole);
#endif
}

// Load values i to i + 15 of a float32 row (n), with zeros after its end.
INLINE Floats KERNEL(load_row)(const float *row, size_t i, size_t n) {
    return i + LANES <= n ? KERNEL(load)(row + i) : KERNEL(load_part)(row, i, n - i, false);
}

// The sum of sixteen values: add one half to the other until one value is left.
INLINE float KERNEL(sum)(Floats v) {
#if defined(KERNEL_AVX512)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float x[LANES];
    KERNEL(store)(x, v);
    for (int n = LANES / 2; n; n /= 2)
        for (int i = 0; i < n; i++) x[i] += x[i + n];
    return x[0];
#endif
}

// The sums of four vectors, each in the same order as in sum().
INLINE void KERNEL(sum_four)(float *out, Floats a, Floats b, Floats c, Floats d) {
#if defined(KERNEL_AVX512)
    __m512 v[] = {(__m512)a, (__m512)b, (__m512)c, (__m512)d};
    for (int i = 0; i < 4; i += 2)
        v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[i], v[i + 1], 0x44),
                             _mm512_shuffle_f32x4(v[i], v[i + 1], 0xEE));
    v[0] = _mm512_add_ps(_mm512_shuffle_f32x4(v[0], v[2], 0x88),
                         _mm512_shuffle_f32x4(v[0], v[2], 0xDD));
    v[0] = _mm512_add_ps(v[0], _mm512_shuffle_ps(v[0], v[0], 0x4E));
    v[0] = _mm512_add_ps(v[0], _mm512_shuffle_ps(v[0], v[0], 0xB1));
    _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, v[0])));
#else
    Floats v[] = {a, b, c, d};
    for (int i = 0; i < 4; i++) out[i] = KERNEL(sum)(v[i]);
#endif
}

INLINE Floats KERNEL(choose)(Ints mask, Floats a, Floats b) {
    return (Floats)((mask & (Ints)a) | (~mask & (Ints)b));
}

INLINE float KERNEL(largest)(Floats v) {
#if defined(KERNEL_AVX512)
    return _mm512_reduce_max_ps((__m512)v);
#else
    float x[LANES];
    KERNEL(store)(x, v);
    for (int n = LANES / 2; n; n /= 2)
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
    Floats squares = {0};
    for (size_t i = 0; i < n; i += LANES) {
        Floats v = KERNEL(load_row)(x, i, n);
        squares += v * v;
    }
    float scale = 1.0f / sqrtf(KERNEL(sum)(squares) / (float)n + eps);
    if (gain) {
        for (size_t i = 0; i < n; i++) out[i] = gain[i] * (scale * x[i]);
    } else {
        for (size_t i = 0; i < n; i++) out[i] = scale * x[i];
    }
}

// h (n) = silu(h) * gate, or relu(h)^2. h and gate have room for whole vectors.
static void KERNEL(activate)(Activation kind, float *h, const float *gate, size_t n) {
    for (size_t i = 0; i < n; i += LANES) {
        Floats v = KERNEL(load)(h + i);
        if (kind == SWIGLU) v = v / (1.0f + KERNEL(exp)(-v)) * KERNEL(load)(gate + i);
        else v = KERNEL(choose)(v > 0.0f, v * v, KERNEL(splat)(0.0f));
        KERNEL(store)(h + i, v);
    }
}

// The index of the largest of x (n), the first one on ties.
static size_t KERNEL(argmax)(const float *x, size_t n) {
    Floats maxima = KERNEL(splat)(-INFINITY);
    Ints index = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, places = index;
    size_t whole = n / LANES * LANES, best = 0;
    for (size_t i = 0; i < whole; i += LANES, index += LANES) {
        Floats v = KERNEL(load)(x + i);
        Ints is_larger = v > maxima;
        maxima = KERNEL(choose)(is_larger, v, maxima);
        places = (is_larger & index) | (~is_larger & places);
    }
    float max = -INFINITY;
    for (size_t i = 0; i < LANES && whole; i++) {
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
    Floats sums = {0};
    for (size_t i = 0; i < n; i += LANES) {
        Floats v = KERNEL(exp)((KERNEL(load_row)(x, i, n) - max) * inverse);
        if (i + LANES <= n) KERNEL(store)(x + i, v), sums += v;
        else memcpy(x + i, &v, (n - i) * sizeof *x), sums += KERNEL(load_row)(x, i, n);
    }
    float share = 1.0f / KERNEL(sum)(sums);
    for (size_t i = 0; i < n; i++) x[i] *= share;
}

// x = cap * tanh(x / cap) (n), with room for whole vectors
static void KERNEL(softcap)(float *x, size_t n, float cap) {
    for (size_t i = 0; i < n; i += LANES) {
        Floats v = KERNEL(load)(x + i) * (2.0f / cap);
        v = KERNEL(choose)(v < -80.0f, KERNEL(splat)(-80.0f), v);
        KERNEL(store)(x + i, cap - 2.0f * cap / (KERNEL(exp)(v) + 1.0f));
    }
}

// sigmoid(a . b), both (n)
static float KERNEL(gate)(const float *a, const float *b, size_t n) {
    Floats sum = {0};
    for (size_t i = 0; i < n; i += LANES)
        sum += KERNEL(load_row)(a, i, n) * KERNEL(load_row)(b, i, n);
    return 1.0f / (1.0f + KERNEL(exp)(KERNEL(splat)(-KERNEL(sum)(sum)))[0]);
}

// Read n bytes, to measure memory bandwidth.
static void KERNEL(read)(const uint8_t *data, size_t n) {
    Words sums[4] = {{0}};
    for (size_t i = 0; i + sizeof sums <= n; i += sizeof sums) {
        Words w[4];
        memcpy(w, data + i, sizeof w);
        for (int j = 0; j < 4; j++) sums[j] += w[j];
    }
    volatile uint32_t kept = (sums[0] + sums[1] + sums[2] + sums[3])[0];
    (void)kept;
}

// Quantize a row of an input to 16-bit integers; a group of columns shares a scale. Zeros follow
// the last column up to a whole vector. NaN becomes 0.
static void KERNEL(quantize)(Input *in, size_t row, size_t n, size_t group, int zero) {
    const float magic = 12582912.0f, *x = in->x + row * in->stride;
    const size_t step = 8 * in->tile;
    const bool is_8bit = in->is_8bit;
    int8_t *at = codes_at(in, row, 0);
    for (size_t g = 0; g * group < n; g++) {
        size_t end = (g + 1) * group < n ? (g + 1) * group : n;
        Floats maxima = {0};
        for (size_t i = g * group; i < end; i += LANES) {
            Floats v = (Floats)((Ints)KERNEL(load)(x + i) & 0x7FFFFFFF);
            maxima = KERNEL(choose)(v > maxima, v, maxima);
        }
        float scale = KERNEL(largest)(maxima) / (127 * 256);
        float inverse = scale > 1e-37f ? 1.0f / scale : 0.0f;  // finite
        Words sum = {0};
        for (size_t i = g * group; i < end; i += LANES) {
            Floats scaled = KERNEL(load)(x + i) * inverse;
            Ints is_number = (scaled > -32768.0f) & (scaled < 32768.0f);
            scaled = KERNEL(choose)(is_number, scaled, KERNEL(splat)(0.0f));
            Ints v = (Ints)(scaled + magic) - (Ints)KERNEL(splat)(magic);
            if (is_8bit) v = (v + 128) & -256;
            Bytes high = __builtin_convertvector((v + 128) >> 8, Bytes);
            Bytes low = __builtin_convertvector(v, Bytes);
            for (size_t quad = 0; quad < LANES / 4; quad++, at += step) {
                memcpy(at, (char *)&high + 4 * quad, 4);
                memcpy(at + 4, (char *)&low + 4 * quad, 4);
            }
            sum += (Words)v;
        }
        uint32_t total = 0;
        for (int i = 0; i < LANES; i++) total += sum[i];
        in->scales[row * in->max_groups + g] = scale;
        in->offsets[row * in->max_groups + g] = (int32_t)(total * (uint32_t)-zero);
    }
}

// sums[lane] += w[lane] . x, four products per lane: w has weights from 0 to 255, x the same four
// values for all lanes.
INLINE Ints KERNEL(dot4)(Ints sums, Codes w, const int8_t *quad, bool is_4bit) {
    int32_t x;
    memcpy(&x, quad, sizeof x);
#if defined(KERNEL_AVX512)
    (void)is_4bit;
    return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)w, _mm512_set1_epi32(x));
#elif defined(KERNEL_AVX2)
    // sums of two products must stay below 2^15: 15 * 128 * 2, or 127 * 128 * 2 with signed weights
    __m256i part[2], all[2], xs = _mm256_set1_epi32(x), ones = _mm256_set1_epi16(1);
    memcpy(part, &w, sizeof part);
    memcpy(all, &sums, sizeof all);
    for (int i = 0; i < 2; i++) {
        __m256i pairs;
        if (is_4bit) {
            pairs = _mm256_maddubs_epi16(part[i], xs);
        } else {
            __m256i with_sign = _mm256_xor_si256(part[i], _mm256_set1_epi8(-128));
            pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(xs), _mm256_sign_epi8(with_sign, xs));
        }
        all[i] = _mm256_add_epi32(all[i], _mm256_madd_epi16(pairs, ones));
    }
    memcpy(&sums, all, sizeof sums);
    return sums;
#elif defined(KERNEL_DOTPROD)
    int8x16_t part[4], xs = vreinterpretq_s8_s32(vdupq_n_s32(x));
    int32x4_t all[4];
    memcpy(part, &w, sizeof part);
    memcpy(all, &sums, sizeof all);
    for (int i = 0; i < 4; i++)
        all[i] = vdotq_s32(all[i], is_4bit ? part[i] : veorq_s8(part[i], vdupq_n_s8(-128)), xs);
    memcpy(&sums, all, sizeof sums);
    return sums;
#else
    (void)is_4bit;
    Ints quads = (Ints)w;
    for (int i = 0; i < 4; i++) sums += (quads >> 8 * i & 255) * (int8_t)((uint32_t)x >> 8 * i);
    return sums;
#endif
}

// Multiply n_blocks blocks of sixteen rows of int8 or int4 by n inputs from t on. Callers pass
// constants as n_blocks and n, so that the sums stay in registers after inlining.
INLINE void KERNEL(tile_of_codes)(const Product *p, size_t block, size_t t, const size_t n_blocks,
                                  const size_t n, const bool is_4bit, const bool has_low) {
    const Tensor *w = p->w;
    const Input *in = p->in;
    const size_t group = w->group, groups = (w->cols + group - 1) / group;
    const size_t per_vector = is_4bit ? 8 : 4;  // columns of sixteen rows in 64 bytes
    const size_t vectors = (w->cols + per_vector - 1) / per_vector;
    const uint8_t *codes = w->data + block * vectors * sizeof(Codes);
    const int8_t *x = codes_at(in, t, 0);
    const size_t step = 8 * in->tile, next_block = vectors * sizeof(Codes);
    // prefetch the next two blocks: tiles of inputs alternate between them; a single tile fetches
    // both
    const size_t ahead = n_blocks == 1 ? 4096 : (2 + t / n % 2) * next_block;
    const bool is_only = in->n < 2 * n;
    Floats out[2][TILE];
    for (size_t b = 0; b < n_blocks; b++)
        for (size_t i = 0; i < n; i++) out[b][i] = KERNEL(splat)(0.0f);
    size_t v = 0;
    for (size_t g = 0; g < groups; g++) {
        Ints high[2][TILE], low[2][TILE];
        for (size_t i = 0; i < n; i++) {
            // signed weights need no offset
            int32_t offset = in->offsets[(t + i) * in->max_groups + g];
            for (size_t b = 0; b < n_blocks; b++) {
                low[b][i] = (Ints){0} + (!is_4bit && KERNEL(IS_SIGNED) ? 0 : offset);
                high[b][i] = (Ints){0};
            }
        }
        size_t end = (g + 1) * group / per_vector;
        if (end > vectors) end = vectors;
        for (; v < end; v++, codes += sizeof(Codes)) {
            Codes c[2], weights[2];
            for (size_t b = 0; b < n_blocks; b++) {
                memcpy(&c[b], codes + b * next_block, sizeof *c);
                if (b == 0 || is_only) __builtin_prefetch(codes + b * next_block + ahead);
            }
            for (size_t half = 0; half < (is_4bit ? 2 : 1); half++, x += step) {
                for (size_t b = 0; b < n_blocks; b++) {
                    weights[b] = half ? (Codes)((Words)c[b] >> 4) : c[b];
                    if (is_4bit) weights[b] &= 15;
                }
                for (size_t i = 0; i < n; i++) {
                    const int8_t *at = x + 8 * i;
                    for (size_t b = 0; b < n_blocks; b++) {
                        high[b][i] = KERNEL(dot4)(high[b][i], weights[b], at, is_4bit);
                        if (has_low)
                            low[b][i] = KERNEL(dot4)(low[b][i], weights[b], at + 4, is_4bit);
                    }
                }
            }
        }
        for (size_t b = 0; b < n_blocks; b++) {
            size_t scale_at = ((block + b) * groups + g) * LANES;
            Floats scale = KERNEL(load_as)(w->scales, scale_at, !w->wide_scales);
            for (size_t i = 0; i < n; i++) {
                float x_scale = in->scales[(t + i) * in->max_groups + g];
                Ints sum = (Ints)((Words)high[b][i] * 256 + (Words)low[b][i]);
                out[b][i] += __builtin_convertvector(sum, Floats) * (scale * x_scale);
            }
        }
    }
    for (size_t b = 0; b < n_blocks; b++)
        for (size_t i = 0; i < n; i++)
            KERNEL(store)(p->out + (t + i) * p->stride + (block + b) * LANES, out[b][i]);
}

// Multiply n_rows rows of float32 or bfloat16 by n inputs from t on. Callers pass constants as
// n_rows and n.
INLINE void KERNEL(rows_of_floats)(const Product *p, size_t row, size_t t, const size_t n_rows,
                                   const size_t n, const bool is_bf16) {
    const Tensor *w = p->w;
    const size_t cols = w->cols, whole = cols / LANES * LANES, stride = p->in->stride;
    const float *x = p->in->x + t * stride;
    Floats sums[ROWS_AT_ONCE][TILE];
    for (size_t r = 0; r < n_rows; r++)
        for (size_t i = 0; i < n; i++) sums[r][i] = KERNEL(splat)(0.0f);
    for (size_t c = 0; c < cols; c += LANES) {
        for (size_t r = 0; r < n_rows; r++) {
            size_t at = (row + r) * cols + c;
            Floats v = c < whole ? KERNEL(load_as)(w->data, at, is_bf16)
                                 : KERNEL(load_part)(w->data, at, cols - whole, is_bf16);
            for (size_t i = 0; i < n; i++) sums[r][i] += v * KERNEL(load)(x + i * stride + c);
        }
    }
    for (size_t i = 0; i < n; i++) {
        float *out = p->out + (t + i) * p->stride + row;
        for (size_t r = 0; r + 4 <= n_rows; r += 4)
            KERNEL(sum_four)(out + r, sums[r][i], sums[r + 1][i], sums[r + 2][i], sums[r + 3][i]);
        if (n_rows == 1) *out = KERNEL(sum)(sums[0][i]);
    }
}

// Multiply rows `row` to end (exclusive) of float32 or bfloat16 by all inputs.
INLINE void KERNEL(block_of_floats)(const Product *p, size_t row, size_t end, const bool is_bf16) {
    const size_t n = p->in->n;
    size_t t = 0;
    for (; t + 4 <= n; t += 4) {
        size_t r = row;
        for (; r + 4 <= end; r += 4) KERNEL(rows_of_floats)(p, r, t, 4, 4, is_bf16);
        for (; r < end; r++) KERNEL(rows_of_floats)(p, r, t, 1, 4, is_bf16);
    }
    for (; t < n; t++) {
        size_t r = row;
        for (; r + 8 <= end; r += 8) KERNEL(rows_of_floats)(p, r, t, 8, 1, is_bf16);
        for (; r < end; r++) KERNEL(rows_of_floats)(p, r, t, 1, 1, is_bf16);
    }
}

// Multiply n_blocks blocks of int8 or int4 by all inputs.
INLINE void KERNEL(blocks_of_codes)(const Product *p, size_t block, const size_t n_blocks,
                                    const bool is_4bit, const bool has_low) {
    const size_t n = p->in->n, tile = n_blocks == 2 && has_low ? KERNEL(TILE) / 2 : KERNEL(TILE);
    size_t t = 0;
    for (; t + tile <= n; t += tile)
        KERNEL(tile_of_codes)(p, block, t, n_blocks, tile, is_4bit, has_low);
    for (; KERNEL(TILE) > 2 && t + 2 <= n; t += 2)
        KERNEL(tile_of_codes)(p, block, t, n_blocks, 2, is_4bit, has_low);
    for (; t < n; t++) KERNEL(tile_of_codes)(p, block, t, n_blocks, 1, is_4bit, has_low);
}

// Multiply blocks first to last (exclusive) of int8 or int4 by all inputs. With enough registers,
// two blocks share each load of an input; with a single input, weights are read in memory order.
INLINE void KERNEL(codes)(const Product *p, size_t first, size_t last, const bool is_4bit,
                          const bool has_low) {
    const bool in_pairs = KERNEL(TILE) > 2 && p->in->n > 1;
    size_t block = first;
    for (; in_pairs && block + 2 <= last; block += 2)
        KERNEL(blocks_of_codes)(p, block, 2, is_4bit, has_low);
    for (; block < last; block++) KERNEL(blocks_of_codes)(p, block, 1, is_4bit, has_low);
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
// out (head_dim) has room for whole vectors. The softmax is online (Milakov & Gimelshein 2018), one
// chunk of positions at a time: a new largest score scales down the sums.
static void KERNEL(attend)(float *out, const float *q, const void *keys, const void *values,
                           size_t head_dim, size_t first, size_t last, bool is_bf16) {
    enum { CHUNK = 8 };  // vectors of positions
    const size_t width = ROUND_UP(head_dim, LANES), end = last / LANES + 1;
    const float scale = 1.0f / sqrtf((float)head_dim);
    const Ints lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const Floats masked = KERNEL(splat)(-INFINITY);
    float max = -INFINITY, weights[CHUNK * LANES];
    Floats sums = {0}, scores[CHUNK];
    memset(out, 0, width * sizeof *out);
    for (size_t start = first / LANES, n; start < end; start += n) {
        n = end - start < CHUNK ? end - start : CHUNK;
        Floats maxima = masked;
        for (size_t b = 0; b < n; b++) {
            const size_t block = start + b;
            Floats parts[4] = {{0}};
            size_t d = 0;
            for (; d + 4 <= head_dim; d += 4)
                for (size_t i = 0; i < 4; i++)
                    parts[i] += q[d + i] *
                                KERNEL(load_as)(keys, (block * head_dim + d + i) * LANES, is_bf16);
            for (; d < head_dim; d++)
                parts[0] += q[d] * KERNEL(load_as)(keys, (block * head_dim + d) * LANES, is_bf16);
            Floats s = ((parts[0] + parts[1]) + (parts[2] + parts[3])) * scale;
            Ints places = lanes + (int32_t)(block * LANES);
            s = KERNEL(choose)((places >= (int32_t)first) & (places <= (int32_t)last), s, masked);
            maxima = KERNEL(choose)(s > maxima, s, maxima);
            scores[b] = s;
        }
        float new_max = KERNEL(largest)(maxima);
        if (new_max > max) {
            float factor = KERNEL(exp)(KERNEL(splat)(max - new_max))[0];
            for (size_t d = 0; d < width; d++) out[d] *= factor;
            sums *= factor;
            max = new_max;
        }
        for (size_t b = 0; b < n; b++) {
            Floats p = KERNEL(exp)(scores[b] - max);
            KERNEL(store)(weights + b * LANES, p);
            sums += p;
        }
        for (size_t d = 0; d < width; d += LANES) {  // masked positions have weight 0
            Floats y[4] = {{0}};
            size_t at = start * LANES * width + d;
            for (size_t i = 0; i < n * LANES; i += 4, at += 4 * width)
                for (size_t j = 0; j < 4; j++)
                    y[j] += weights[i + j] * KERNEL(load_as)(values, at + j * width, is_bf16);
            KERNEL(store)(out + d, KERNEL(load)(out + d) + ((y[0] + y[1]) + (y[2] + y[3])));
        }
    }
    float sum = KERNEL(sum)(sums);
    for (size_t d = 0; d < width; d++) out[d] /= sum;
}

static const Kernels KERNEL(kernels) = {
    .name = NAME,
    .rmsnorm = KERNEL(rmsnorm), .activate = KERNEL(activate), .argmax = KERNEL(argmax),
    .softmax = KERNEL(softmax),
    .softcap = KERNEL(softcap), .gate = KERNEL(gate), .read = KERNEL(read),
    .quantize = KERNEL(quantize), .matmul = KERNEL(matmul), .attend = KERNEL(attend),
};

#undef KERNEL
#undef KERNEL_AVX2
#undef KERNEL_AVX512
#undef KERNEL_DOTPROD
#undef NAME
#undef INLINE
