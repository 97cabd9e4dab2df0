// Llama inference in plain C: model.bin and a prompt in, a story out.
//
//   ./run model.bin -z tok.bin -i "Once upon a time"
//
// From prompt to logits:
//
//   main()         parses the options, calls load_model() and load_tokenizer()
//   load_model()   reads the header, checks it, and finds the tensors with lay_out()
//   generate()     turns the prompt into tokens with encode() and passes them to prefill()
//   prefill()      runs them in batches of up to MAX_BATCH tokens, which feed() builds
//   run_batch()    starts the threads, which all run forward()
//   forward()      embedding, layers, output head: the whole model, in order, with all shapes
//   kernels.h      the inner loops: matmul, attend, rmsnorm, softmax, ...
//
// generate() then samples the next token with sample(), runs it as the next batch, and so on.
// Sections: errors and memory, weight formats, the model file, the forward pass, the tokenizer,
// sampling, stories, evaluation, speed, the command line. Shapes are (rows, columns).
//
// No input may crash it: every size is checked before use, and every error ends in die() with one
// sentence.
//
// To add
// - an architecture option: its field or bit in Config, its range in check_config(), its tensor in
//   lay_out(), its use in forward(); also in formats/modelbin.py and doc/format.md
// - an activation: its name in Activation, is_gated() if it needs w3, its formula in activate() of
//   kernels.h; the head of model.py lists the places outside this file
// - a weight format: its row in FORMATS, its product in kernels.h; also in formats/modelbin.py and
//   doc/format.md
// - an instruction set: its block where kernels.h is included, its row in pick_kernels()
// - a pre-token pattern: its number in load_byte_level(), its matcher in pretoken(); also in
//   PATTERNS of bpe.py

#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed only to inlined functions
#endif
#define _XOPEN_SOURCE 700         // POSIX.1-2008 with realpath()
#define __USE_MINGW_ANSI_STDIO 1  // a standard printf()
#include <ctype.h>
#include <errno.h>
#include <float.h>
#include <limits.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#if defined(_WIN32)
#include <io.h>
#define isatty _isatty
#define fileno _fileno
#define fseeko _fseeki64
#define ftello _ftelli64
#else
#include <unistd.h>
#endif
#if defined(_WIN32) || defined(__wasm__)
#define realpath(path, out) NULL
#else
#define IS_POSIX
#include <signal.h>
#include <sys/mman.h>
#endif
#define DO_PRAGMA(x) _Pragma(#x)
#if defined(_OPENMP)
#include <omp.h>
#define OMP(...) DO_PRAGMA(omp __VA_ARGS__)
#else  // one thread
#define OMP(...)
static int omp_get_thread_num(void) { return 0; }
static int omp_get_num_threads(void) { return 1; }
static int omp_get_max_threads(void) { return 1; }
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#elif defined(__wasm_simd128__)
#include <wasm_simd128.h>
#endif

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
#error "model.bin is little-endian, and this engine does not swap bytes"
#endif

// ------------------------------------------------------------------------------------------------
// Errors and memory

// Where errors go: the library returns the text to its caller; the command line prints it and
// exits.
static _Thread_local struct {
    jmp_buf *caller;  // NULL: the command line
    char *text;
    size_t size;
} on_error;

#if defined(__GNUC__) && !defined(_WIN32)
__attribute__((format(printf, 1, 2)))
#endif
_Noreturn static void die(const char *format, ...) {
    va_list args;
    va_start(args, format);
    if (on_error.caller) {
        vsnprintf(on_error.text, on_error.size, format, args);
        longjmp(*on_error.caller, 1);
    }
    fflush(stdout);
    fputs("error: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    exit(EXIT_FAILURE);
}

#define ROUND_UP(n, unit) (((n) + (unit) - 1) / (unit) * (unit))

// All allocations and mapped files, newest first, in a list that can release them together, even
// after an error.
typedef struct Block {
    struct Block *next;
    void *map;  // a mapped file, or NULL
    size_t map_size;
} Block;

static _Thread_local Block *blocks;

// Zeroed memory for n items, aligned to a cache line. All buffers come from here.
static void *alloc(uint64_t n, size_t size) {
    const size_t line = 64, extra = sizeof(Block) + line;
    Block *b = n > (SIZE_MAX - extra) / size ? NULL : calloc((size_t)n * size + extra, 1);
    if (!b) die("not enough memory for %llu x %zu bytes", (unsigned long long)n, size);
    b->next = blocks;
    blocks = b;
    return (char *)b + (ROUND_UP((uintptr_t)(b + 1), line) - (uintptr_t)b);
}

// Free everything allocated after the block `kept`, or everything if it is NULL.
static void release_to(const Block *kept) {
    while (blocks != kept) {
        Block *b = blocks;
        blocks = b->next;
#if defined(IS_POSIX)
        if (b->map) munmap(b->map, b->map_size);
#endif
        free(b);
    }
}

// A whole file, read-only. The command line maps it, so that weights are read on first use. The
// library copies it, because SIGBUS would kill its caller if a mapped file shrank.
typedef struct {
    const char *path;
    const uint8_t *data;
    size_t size;
} File;

static const char MODEL_HINT[] = "make one with train.py or export.py";
static const char TOKENIZER_HINT[] = "pass the model's tokenizer file (-z)";

_Noreturn static void die_unopened(const char *path, const char *hint) {
    if (errno == ENOENT) die("%s does not exist; %s", path, hint);
    die("cannot read %s: %s", path, strerror(errno));
}

// Open a file; `hint` says what to do if it does not exist.
static File open_file(const char *path, const char *hint) {
    bool is_copied = true;
#if defined(IS_POSIX)
    struct stat info;
    if (stat(path, &info)) die_unopened(path, hint);
    if (!S_ISREG(info.st_mode)) die("%s is not a regular file", path);
    is_copied = on_error.caller;
#endif
    FILE *stream = fopen(path, "rb");
    if (!stream || fseeko(stream, 0, SEEK_END)) die_unopened(path, hint);
    int64_t size = ftello(stream);
    rewind(stream);
    if (size <= 0) fclose(stream);
    if (!size) die("%s is empty", path);
    if (size < 0 || (uint64_t)size > SIZE_MAX) die("%s is too large for this machine", path);
    File f = {.path = path, .size = (size_t)size};
    uint8_t *data = alloc(is_copied ? f.size : 0, 1);  // its Block records the mapping
#if defined(IS_POSIX)
    void *map = is_copied ? data : mmap(NULL, f.size, PROT_READ, MAP_PRIVATE, fileno(stream), 0);
    if (map == MAP_FAILED) die("cannot read %s: %s", path, strerror(errno));
    if (!is_copied) blocks->map = data = map, blocks->map_size = f.size;
#endif
    size_t n = is_copied ? fread(data, 1, f.size, stream) : f.size;
    fclose(stream);
    if (n < f.size) die("cannot read %s: got only %zu of %zu bytes", path, n, f.size);
    f.data = data;
    return f;
}

static double seconds(void) {
#if defined(_WIN32)
    return (double)clock() / CLOCKS_PER_SEC;  // wall-clock time on Windows
#else
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
#endif
}

// Wait briefly: spin, or sleep to give up the core.
static void wait_briefly(bool may_sleep) {
    (void)may_sleep;  // unused on some platforms
#if defined(IS_POSIX)
    if (may_sleep) nanosleep(&(struct timespec){.tv_nsec = 20000}, NULL);
#endif
#if defined(__x86_64__)
    if (!may_sleep) _mm_pause();
#elif defined(__aarch64__)
    if (!may_sleep) __asm__ volatile("yield");
#endif
}

// ------------------------------------------------------------------------------------------------
// Weight formats, and the interface of the kernels that multiply them

// LANES: how many values kernels compute together, whatever the register size of the machine;
// CODES: how many bytes of a Tensor hold 4 (int4: 8) columns of 16 rows;
// TILE: the maximum number of inputs processed at a time
enum { LANES = 16, CODES = 64, TILE = 8 };

typedef enum { FP32, BF16, INT8, INT4, N_FORMATS } Format;

// int8 and int4: a weight is (code - zero) * scale; `group` columns of a row share a scale.
static const struct {
    const char *name;
    size_t bits, group, zero;
    size_t per_code;  // columns of a row stored together
} FORMATS[N_FORMATS] = {
    [FP32] = {"fp32", 32, 0, 0, 1},
    [BF16] = {"bf16", 16, 0, 0, 1},
    [INT8] = {"int8", 8, 64, 128, 4},
    [INT4] = {"int4", 4, 32, 8, 8},
};

// A matrix (rows, cols) as stored in the model file. fp32 and bf16 are row-major. int8 and int4 are
// stored in blocks of `lanes` rows: 16 for multiplied matrices, 1 for lookup tables. A block has
// the first 4 (int4: 8) columns of each of its rows, then the next columns of each row, and so on.
// int4 packs columns 0 to 3 into the low halves of 4 bytes and columns 4 to 7 into the high halves.
// Padding has the value zero. Scales are (blocks, groups of columns, lanes).
typedef struct {
    Format format;
    size_t rows, cols, lanes, group;
    const uint8_t *data;
    const void *scales;   // bfloat16, or float32 in llama2.c's version 2
    bool wide_scales;
} Tensor;

// n rows of activations, the input of a product.
typedef struct {
    float *x;          // (n, stride)
    // for int8 and int4 matrices: x is about code * scale of its group, with codes of 16 bits
    int8_t *codes;     // (n / tile, stride / 4, tile, 8): four 16-bit codes or, if the kernels want
                       // that, their four high bytes and then their four low bytes
    float *scales;     // (n, max_groups)
    int32_t *offsets;  // (n, max_groups): -zero * the group's sum
    size_t stride, max_groups, n;
    size_t tile;       // rows multiplied at a time: TILE, or n if n is smaller
    bool is_8bit;      // the low byte of every code is 0
} Input;

// Where a row's codes of columns 4 * quad to 4 * quad + 3 start.
static inline int8_t *codes_at(const Input *in, size_t row, size_t quad) {
    return in->codes + ((row / in->tile * (in->stride / 4) + quad) * in->tile + row % in->tile) * 8;
}

// out (n, stride) = in (n, cols) @ w^T; stride includes padding to whole blocks of 16 columns.
typedef struct {
    const Tensor *w;
    const Input *in;
    float *out;
    size_t stride;
} Product;

// The activation of the feed-forward, numbered as in the file's header.
typedef enum { SWIGLU, RELU2, N_ACTIVATIONS } Activation;

// Whether the activation is gated by a third matrix, w3.
static bool is_gated(Activation a) { return a == SWIGLU; }

// How --bench reads memory.
typedef enum { PLAIN, PREFETCHED, EIGHT_STREAMS, PATTERNS } Pattern;

typedef struct {  // the functions of kernels.h for one instruction set
    const char *name;
    void (*rmsnorm)(float *out, const float *x, const float *gain, size_t n, float eps);
    void (*activate)(Activation kind, float *h, const float *gate, size_t n);
    size_t (*argmax)(const float *x, size_t n);
    void (*softmax)(float *x, size_t n, float temperature);
    void (*softcap)(float *x, size_t n, float cap);
    float (*gate)(const float *a, const float *b, size_t n);
    void (*read)(const uint8_t *data, size_t n, Pattern pattern);
    void (*quantize)(Input *in, size_t row, size_t n, size_t group, int zero);
    void (*matmul)(const Product *p, size_t first_block, size_t last_block);
    void (*attend)(float *out, const float *q, const void *keys, const void *values,
                   size_t head_dim, size_t first, size_t last, bool is_bf16);
} Kernels;

#if defined(__clang__)
#define TARGET_PUSH(features) \
    DO_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define TARGET_POP _Pragma("clang attribute pop")
#else
#define TARGET_PUSH(features) _Pragma("GCC push_options") DO_PRAGMA(GCC target(features))
#define TARGET_POP _Pragma("GCC pop_options")
#endif

// The kernels, compiled once for each instruction set: kernels_portable, kernels_avx2, ...
#define KERNEL(name) name##_portable
#if defined(__wasm_simd128__)  // WebAssembly has no choice at run time
#define KERNEL_SIMD128
#endif
#include "kernels.h"
#if defined(__x86_64__)
#define KERNEL(name) name##_avx2
#define KERNEL_AVX2
TARGET_PUSH("avx2")
#include "kernels.h"
TARGET_POP
#define KERNEL(name) name##_avx512
#define KERNEL_AVX512
TARGET_PUSH("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#include "kernels.h"
TARGET_POP
#elif defined(__ARM_FEATURE_DOTPROD)
#define KERNEL(name) name##_dotprod
#define KERNEL_DOTPROD
#include "kernels.h"
#endif

// The fastest kernels that this machine can run. Tests select others with RUN_KERNELS.
static const Kernels *pick_kernels(void) {
    const Kernels *best = &kernels_portable, *all[3] = {best};
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) best = all[1] = &kernels_avx2;
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        best = all[2] = &kernels_avx512;
#elif defined(__ARM_FEATURE_DOTPROD)
    best = all[1] = &kernels_dotprod;
#endif
#if defined(__wasm__)
    const char *wanted = NULL;  // there is no environment
#else
    const char *wanted = getenv("RUN_KERNELS");
#endif
    for (size_t i = 0; wanted && i < 3; i++)
        if (all[i] && !strcmp(all[i]->name, wanted)) best = all[i];
    return best;
}

// ------------------------------------------------------------------------------------------------
// The model file: a header and the weights, see doc/format.md

// The header of version 3; the window of each layer follows it, int32 (n_layers). Versions 0 to 2
// have fewer fields; the rest get Llama 2's values, with the options NORM_GAINS and, if tied,
// TIE_EMBEDDINGS.
typedef struct {
    uint32_t magic;
    int32_t version;
    uint64_t file_size;
    uint32_t header_size;
    uint32_t options;     // bits, see below
    uint32_t format;      // of matrices and tables; vectors are fp32
    uint32_t activation;  // of the feed-forward
    int32_t dim;          // width of the residual stream
    int32_t hidden_dim;   // width inside the feed-forward
    int32_t n_layers;
    int32_t n_heads;      // query heads
    int32_t n_kv_heads;   // key and value heads; each serves n_heads / n_kv_heads query heads
    int32_t vocab_size;
    int32_t seq_len;           // longest context
    int32_t value_embeddings;  // how many of the first layers add an embedding to their values
    int32_t bigram_rows;       // rows of the table hashed by (previous token, token); 0: none
    float norm_eps, rope_theta;
    float logit_softcap;  // c: logits become c * tanh(logits / c); 0: none
    uint32_t tokenizer;   // fingerprint() of the tokenizer; 0: unknown. Earlier files lack it
    int32_t group;        // version 2: weights that share a scale; not in version 3's header
} Config;

enum {  // bits of Config.options
    TIE_EMBEDDINGS = 1,     // the output head is the embedding table
    QK_NORM = 2,            // RMSNorm of each query and key head, before RoPE
    NORM_GAINS = 4,         // RMSNorm has gains
    EMBEDDING_NORM = 8,     // RMSNorm after the embedding
    RESIDUAL_SCALARS = 16,  // a layer starts from a * x + b * x0; x0 is the embedding
    SMEAR = 32,             // a gate adds the embedding of the previous token
    ORDERS = 64,            // trained on stories with orders, see order_prompt()
    KNOWN_OPTIONS = 127,
};

enum {
    MAGIC = 0x616b3432,
    HEADER_BYTES = offsetof(Config, group),
    EARLIER_HEADER_BYTES = offsetof(Config, tokenizer),
    ALIGNMENT = 64,  // of the tensors of version 3
    MAX_COPY = 1 << 22,  // bytes: smaller files are copied for alignment, see load_weights()
    MAX_CONTEXT = 1 << 24,
    MAX_GROUP = 256,  // sums of larger groups might overflow 32 bits
};

// The header's minimum size, by version
static const uint32_t HEADER_SIZES[] = {7 * sizeof(int32_t), 256, 256, EARLIER_HEADER_BYTES};

_Static_assert(HEADER_BYTES == 84, "the header has no gaps");

static bool has(const Config *c, uint32_t option) { return c->options & option; }

// The tensors of a model; NULL if the model lacks one. Tensors of the layers are arrays; layer l
// uses item or row l.
typedef struct {
    const Tensor *tok_embeddings;    // (vocab_size, dim)
    const Tensor *bigram;            // (bigram_rows, dim)
    const Tensor *output;            // (vocab_size, dim), tok_embeddings if tied
    const float *embedding_norm;     // (dim)
    const float *smear_gate;         // (dim)
    const float *norm;               // (dim)
    // one matrix per layer
    const Tensor *wq;                // (n_heads * head_dim, dim)
    const Tensor *wk, *wv;           // (n_kv_heads * head_dim, dim)
    const Tensor *wo;                // (dim, n_heads * head_dim)
    const Tensor *w1, *w3;           // (hidden_dim, dim); w3 only for SwiGLU
    const Tensor *w2;                // (dim, hidden_dim)
    const Tensor *value_embeddings;  // (vocab_size, n_kv_heads * head_dim), first layers only
    const float *attention_norm;     // (n_layers, dim)
    const float *ffn_norm;           // (n_layers, dim)
    const float *q_norm, *k_norm;    // (n_layers, head_dim)
    const float *x_scale, *x0_scale;  // (n_layers): a layer starts from x_scale * x + x0_scale * x0
    const int32_t *windows;          // (n_layers): positions attended to, 0: all
} Weights;

// Row l of vectors (n_layers, size), or NULL if the model has none.
static const float *row_of(const float *vectors, size_t l, size_t size) {
    return vectors ? vectors + l * size : NULL;
}

// Read the header of any version, unchecked.
static Config read_header(const File *f) {
    uint32_t words[2] = {0};
    memcpy(words, f->data, f->size < sizeof words ? f->size : sizeof words);
    bool is_gguf = !memcmp(words, "GGUF", 4);
    if (is_gguf || !memcmp(words, "PK\3\4", 4))
        die("%s is not a model.bin: it is a %s; convert it: "
            "python export.py model.bin --checkpoint=%s", f->path,
            is_gguf ? "GGUF file" : "checkpoint or zip file", f->path);
    if (!memcmp(words, "version ", 8))
        die("%s is not a model.bin: it is a Git LFS pointer; run git lfs pull in its folder",
            f->path);
    bool has_magic = f->size >= sizeof words && words[0] == MAGIC;
    if (has_magic && (words[1] < 1 || words[1] > 3))
        die("%s is a model.bin of version %u, expected 0 to 3; export it again", f->path, words[1]);
    int version = has_magic ? (int)words[1] : 0;
    if (f->size < HEADER_SIZES[version])
        die("%s is truncated or not a model.bin: it has %zu bytes, and a version %d header has %u",
            f->path, f->size, version, HEADER_SIZES[version]);
    Config c = {0};
    if (version == 3) {
        memcpy(&c, f->data, EARLIER_HEADER_BYTES);
        if (c.header_size == HEADER_BYTES && f->size >= HEADER_BYTES)
            memcpy(&c, f->data, HEADER_BYTES);
        return c;
    }
    int32_t h[7];
    const uint8_t *at = f->data + (version ? 8 : 0);
    memcpy(h, at, sizeof h);
    // a negative vocab_size marks an untied head in version 0
    bool is_tied = version ? at[sizeof h] : h[5] > 0;
    if (version == 2) memcpy(&c.group, at + sizeof h + 1, sizeof c.group);
    return (Config){
        .version = version, .file_size = f->size, .header_size = HEADER_SIZES[version],
        .options = NORM_GAINS | (is_tied ? TIE_EMBEDDINGS : 0),
        .format = version == 2 ? INT8 : FP32,
        .dim = h[0], .hidden_dim = h[1], .n_layers = h[2], .n_heads = h[3], .n_kv_heads = h[4],
        .vocab_size = version || is_tied || h[5] == INT32_MIN ? h[5] : -h[5], .seq_len = h[6],
        .norm_eps = 1e-5f, .rope_theta = 10000.0f, .group = c.group,
    };
}

static void check_config(const Config *c, const char *path) {
    uint32_t header_size = HEADER_SIZES[c->version];
    if (c->version == 3 && c->header_size != header_size) header_size = HEADER_BYTES;
    struct {
        const char *name;
        double value, min, max;
    } ranges[] = {
        {"header_size", c->header_size, header_size, header_size},
        {"options", c->options, 0, KNOWN_OPTIONS},
        {"dtype", c->format, 0, N_FORMATS - 1},
        {"activation", c->activation, 0, N_ACTIVATIONS - 1},
        {"dim", c->dim, 1, 1 << 16},
        {"hidden_dim", c->hidden_dim, 1, 1 << 20},
        {"n_layers", c->n_layers, 1, 1 << 12},
        {"n_heads", c->n_heads, 1, 1 << 12},
        {"n_kv_heads", c->n_kv_heads, 1, 1 << 12},
        {"vocab_size", c->vocab_size, 3, 1 << 24},  // at least unk, BOS and EOS
        {"max_seq_len", c->seq_len, 1, MAX_CONTEXT},
        {"value_embeddings", c->value_embeddings, 0, c->n_layers},
        {"bigram_rows", c->bigram_rows, c->bigram_rows == 1 ? 2 : 0, 1 << 28},
        {"norm_eps", c->norm_eps, 0, 1},
        {"rope_theta", c->rope_theta, 1, 1e12},
        {"logit_softcap", c->logit_softcap, 0, 1e6},
    };
    for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++)
        if (!(ranges[i].value >= ranges[i].min && ranges[i].value <= ranges[i].max))
            die("%s is not a version %d model.bin: its header says %s = %.10g, expected %.10g to "
                "%.10g; it is damaged or needs a newer run.c: export it again", path,
                c->version, ranges[i].name, ranges[i].value, ranges[i].min, ranges[i].max);
    if (c->dim % c->n_heads || (c->dim / c->n_heads) % 2 || c->n_heads % c->n_kv_heads)
        die("%s is not a version %d model.bin: its header's dim = %d, n_heads = %d and n_kv_heads "
            "= %d do not fit together; export it again", path, c->version, c->dim, c->n_heads,
            c->n_kv_heads);
    if (c->version == 2 && (c->group < LANES || c->group > MAX_GROUP || c->group % LANES ||
                            c->dim % c->group || c->hidden_dim % c->group))
        die("%s has groups of %d weights: expected a multiple of %d up to %d that divides dim = %d "
            "and hidden_dim = %d; export the checkpoint with export.py", path, c->group, LANES,
            MAX_GROUP, c->dim, c->hidden_dim);
}

static float bf16_at(const void *p, size_t i) {
    uint32_t bits = (uint32_t)((const uint16_t *)p)[i] << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// out = row r of a tensor of any format; out has room for cols rounded up to LANES
static void read_row(float *out, const Tensor *t, size_t r) {
    if (t->format == FP32) memcpy(out, t->data + r * t->cols * sizeof *out, t->cols * sizeof *out);
    if (t->format == BF16)
        for (size_t c = 0; c < t->cols; c++) out[c] = bf16_at(t->data, r * t->cols + c);
    if (!t->group) return;
    size_t per_code = FORMATS[t->format].per_code, groups = (t->cols + t->group - 1) / t->group;
    size_t steps = (t->cols + per_code - 1) / per_code, block = r / t->lanes, lane = r % t->lanes;
    int zero = (int)FORMATS[t->format].zero;
    const uint8_t *codes = t->data + (block * steps * t->lanes + lane) * 4;
    for (size_t c = 0; c < t->cols; c += per_code, codes += 4 * t->lanes) {
        size_t at = (block * groups + c / t->group) * t->lanes + lane;
        float scale = t->wide_scales ? ((const float *)t->scales)[at] : bf16_at(t->scales, at);
        for (int i = 0; i < 4; i++) {
            int low = per_code == 8 ? codes[i] & 15 : codes[i];
            out[c + i] = (float)(low - zero) * scale;
            if (per_code == 8) out[c + 4 + i] = (float)((codes[i] >> 4) - zero) * scale;
        }
    }
}

// Convert a row-major int8 matrix of version 2 to the layout of Tensor: -127..127 become 1..255.
static void repack(Tensor *t) {
    const float *from = t->scales;
    size_t groups = t->cols / t->group, lanes = t->lanes, padded = ROUND_UP(t->rows, lanes);
    uint8_t *codes = alloc((uint64_t)padded * t->cols, 1);
    float *scales = alloc((uint64_t)padded * groups, sizeof(float));
    memset(codes, (int)FORMATS[INT8].zero, padded * t->cols);
    for (size_t r = 0; r < t->rows; r++) {
        size_t block = r / lanes, lane = r % lanes;
        for (size_t c = 0; c < t->cols; c++) {
            int code = (int8_t)t->data[r * t->cols + c] + 128;
            codes[(block * t->cols + c / 4 * 4) * lanes + lane * 4 + c % 4] = code ? code : 1;
        }
        for (size_t g = 0; g < groups; g++)
            scales[(block * groups + g) * lanes + lane] = from[r * groups + g];
    }
    t->data = codes;
    t->scales = scales;
}

// A walk over the tensors in file order. The first of two walks has no data and only computes the
// size that the file must have.
typedef struct {
    const uint8_t *data;  // the whole file, or NULL
    uint64_t at;          // offset of the next byte
    uint64_t alignment;
    uint64_t matrix_bytes;  // read for every token
    const Config *config;
} Walk;

// Skip n bytes and return where they start, or NULL without data. Within the ranges of
// check_config(), no sum overflows.
static const uint8_t *skip(Walk *w, uint64_t n) {
    if (!n) return NULL;
    uint64_t at = ROUND_UP(w->at, w->alignment);
    w->at = at + n;
    return w->data ? w->data + at : NULL;
}

// The next n vectors: (n, size) in float32.
static const float *walk_vectors(Walk *w, uint64_t n, uint64_t size) {
    return (const float *)skip(w, n * size * sizeof(float));
}

// The next n matrices, all (rows, cols): multiplied (lanes = 16) or looked up by row (lanes = 1).
static const Tensor *walk_tensors(Walk *w, size_t n, uint64_t rows, uint64_t cols, size_t lanes) {
    Format f = w->config->format;
    bool is_v2 = w->config->version == 2;
    size_t group = is_v2 ? (size_t)w->config->group : FORMATS[f].group;
    uint64_t data_bytes = rows * cols * FORMATS[f].bits / 8, scale_bytes = 0, at_once = n;
    if (is_v2) {  // row-major; each matrix is followed by its scales
        scale_bytes = rows * cols / group * sizeof(float);
        at_once = 1;
    } else if (group) {  // the n matrices, then the scales of all n
        uint64_t padded = ROUND_UP(rows, lanes), groups = (cols + group - 1) / group;
        data_bytes = padded * ROUND_UP(cols, FORMATS[f].per_code) * FORMATS[f].bits / 8;
        scale_bytes = padded * groups * sizeof(uint16_t);
    }
    if (lanes == LANES) w->matrix_bytes += n * (data_bytes + scale_bytes);
    Tensor *tensors = w->data && n ? alloc(n, sizeof(Tensor)) : NULL;
    for (size_t first = 0; first < n; first += at_once) {
        const uint8_t *data = skip(w, at_once * data_bytes);
        const uint8_t *scales = skip(w, at_once * scale_bytes);
        for (size_t i = 0; tensors && i < at_once; i++) {
            Tensor *t = &tensors[first + i];
            *t = (Tensor){f, rows, cols, lanes, group, data + i * data_bytes,
                          scales ? scales + i * scale_bytes : NULL, is_v2};
            if (is_v2) repack(t);
        }
    }
    return tensors;
}

// Find the tensors after the header, in the order of doc/format.md. Returns where the last ends.
static uint64_t lay_out(Weights *m, Walk *w) {
    const Config *c = w->config;
    const bool is_tied = has(c, TIE_EMBEDDINGS), gains_first = c->version == 1 || c->version == 2;
    uint64_t dim = c->dim, hidden = c->hidden_dim, vocab = c->vocab_size, layers = c->n_layers;
    uint64_t head_dim = dim / c->n_heads, kv_dim = head_dim * c->n_kv_heads;
    uint64_t gains = has(c, NORM_GAINS) ? layers : 0, head_gains = has(c, QK_NORM) ? gains : 0;
    uint64_t scalars = has(c, RESIDUAL_SCALARS) ? layers : 0;
    if (gains_first) {
        m->attention_norm = walk_vectors(w, layers, dim);
        m->ffn_norm = walk_vectors(w, layers, dim);
        m->norm = walk_vectors(w, 1, dim);
    }
    m->tok_embeddings = walk_tensors(w, 1, vocab, dim, is_tied ? LANES : 1);
    if (!gains_first) m->attention_norm = walk_vectors(w, gains, dim);
    m->wq = walk_tensors(w, layers, dim, dim, LANES);
    m->wk = walk_tensors(w, layers, kv_dim, dim, LANES);
    m->wv = walk_tensors(w, layers, kv_dim, dim, LANES);
    m->wo = walk_tensors(w, layers, dim, dim, LANES);
    if (!gains_first) m->ffn_norm = walk_vectors(w, gains, dim);
    m->w1 = walk_tensors(w, layers, hidden, dim, LANES);
    m->w2 = walk_tensors(w, layers, dim, hidden, LANES);
    m->w3 = walk_tensors(w, is_gated(c->activation) ? layers : 0, hidden, dim, LANES);
    if (!gains_first) m->norm = walk_vectors(w, gains > 0, dim);
    if (c->version == 0) skip(w, c->seq_len * head_dim * sizeof(float));  // RoPE's tables
    m->output = is_tied ? m->tok_embeddings : walk_tensors(w, 1, vocab, dim, LANES);
    m->q_norm = walk_vectors(w, head_gains, head_dim);
    m->k_norm = walk_vectors(w, head_gains, head_dim);
    m->embedding_norm = walk_vectors(w, has(c, EMBEDDING_NORM) && gains, dim);
    m->x_scale = walk_vectors(w, scalars, 1);
    m->x0_scale = walk_vectors(w, scalars, 1);
    m->value_embeddings = walk_tensors(w, c->value_embeddings, vocab, kv_dim, 1);
    m->bigram = walk_tensors(w, c->bigram_rows > 0, c->bigram_rows, dim, 1);
    m->smear_gate = walk_vectors(w, has(c, SMEAR), dim);
    return w->at;
}

// ------------------------------------------------------------------------------------------------
// The forward pass

// A token of a batch. A story's tokens are adjacent, in the order of their positions.
typedef struct {
    int token;
    int previous;       // the token before it, -1: none
    int pos;            // its position in its story, below n_positions
    int story;          // the index of its story, below n_stories
    bool wants_logits;  // for the next token
} BatchToken;

enum { MAX_BATCH = 128, MAX_STORIES = 1024, MAX_THREADS = 256, MIN_WORK = 1 << 16,
       MIN_ROPE = 256, MIN_PATIENCE = 16, MAX_PATIENCE = 2048 };

typedef struct {
    File file;
    Config config;
    Weights weights;
    uint64_t matrix_bytes;  // read for every token
    const Kernels *kernels;
    size_t n_positions;  // room for each story, up to seq_len
    size_t n_stories;    // generated at once
    size_t max_batch;    // tokens in a batch
    size_t max_wanted;   // tokens of a batch whose logits are wanted
    // buffers for the tokens of a batch; width is dim rounded up to LANES, hidden is hidden_dim
    size_t width, hidden;
    float *x;         // (max_batch, width) the residual stream
    float *x0;        // (max_batch, width) the embedding, for RESIDUAL_SCALARS
    float *added;     // (max_batch, width) the output of a block, to be added to x
    float *q;         // (max_batch, width)
    float *k, *v;     // (max_batch, width)
    float *gate;      // (max_batch, hidden) normed @ w3^T of SwiGLU
    float *scratch;   // (n_threads, width)
    float *logits;    // (max_wanted, vocab_size padded)
    Input normed;     // (max_batch, width) rmsnorm(x), the input of a block
    Input mixed;      // (max_batch, width) the heads' outputs, the input of wo
    Input inner;      // (max_batch, hidden) the input of w2
    Input wanted;     // (max_batch, width) the output head's input: only tokens that want logits
    bool is_fast;     // int8 and int4: 8-bit activations instead of 16-bit
    // the key/value cache, fp32 or bf16; n_positions is padded to LANES; in values, head_dim is too
    bool bf16_cache;
    uint8_t *keys;    // (n_stories, n_layers, n_kv_heads, n_positions / 16, head_dim, 16)
    uint8_t *values;  // (n_stories, n_layers, n_kv_heads, n_positions, head_dim)
    float *rope_cos;  // (n_positions, head_dim / 2)
    float *rope_sin;
    size_t n_rope;    // rows filled in both
    // threads
    int n_threads;   // maximum
    int n_active;    // in use: fewer while other programs use the cores
    int n_passes;    // since n_active changed
    int patience;    // passes before more threads are tried
    double spent, wasted;  // seconds in recent passes, and those lost, see Pass
    atomic_int n_arrived, round;  // of the barrier, see arrive()
} Model;

static Input new_input(const Model *m, size_t stride) {
    size_t groups = stride / LANES + 1;  // a group has at least LANES columns
    return (Input){
        .x = alloc(m->max_batch * stride, sizeof(float)),
        .codes = alloc(ROUND_UP(m->max_batch, TILE) * stride, 2),
        .scales = alloc(m->max_batch * groups, sizeof(float)),
        .offsets = alloc(m->max_batch * groups, sizeof(int32_t)),
        .stride = stride, .max_groups = groups, .is_8bit = m->is_fast,
    };
}

static void set_rows(Input *in, size_t n) {
    in->n = n;
    in->tile = n < TILE ? n : TILE;
}

static size_t logits_stride(const Model *m) {
    return ROUND_UP((size_t)m->config.vocab_size, LANES);
}

// The logits (vocab_size) after the i-th of the tokens that want logits in the last batch. The
// caller may overwrite them.
static float *logits_of(const Model *m, size_t i) { return m->logits + i * logits_stride(m); }

// ---- Threads. All of them run forward(). They split the rows of a product, or the tokens of the
// batch, then wait for each other. They spin because the next product is only microseconds away.

// A forward pass as one thread sees it
typedef struct {
    Model *m;
    const BatchToken *batch;  // (n)
    size_t n;                 // tokens
    size_t n_wanted;          // tokens that want logits
    int thread, n_threads;
    size_t first, end;        // this thread's share of the tokens, set by begin_tokens()
    double lost;              // seconds spent waiting for a thread that was not running
} Pass;

// Wait until all threads have arrived and the last one calls release_threads(). In that last
// thread, return true at once: it must make the call.
static bool arrive(Pass *p) {
    Model *m = p->m;
    int round = atomic_load_explicit(&m->round, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&m->n_arrived, 1, memory_order_acq_rel) == p->n_threads - 1)
        return true;
    double start = 0.0;
    for (int spins = 0; atomic_load_explicit(&m->round, memory_order_acquire) == round;) {
        // a wait this long means that another program has the core of a missing thread
        wait_briefly(spins >= 10000);
        if (spins < 10000 && ++spins == 10000) start = seconds();
    }
    if (start > 0.0) p->lost += seconds() - start;
    return false;
}

static void release_threads(Model *m) {
    atomic_store_explicit(&m->n_arrived, 0, memory_order_relaxed);
    atomic_fetch_add_explicit(&m->round, 1, memory_order_release);
}

static void wait_for_all(Pass *p) {
    if (p->n_threads > 1 && arrive(p)) release_threads(p->m);
}

// Begin per-token work: wait until all threads have arrived, then set first and end to this
// thread's share of the tokens. If there is only one token, the last thread to arrive gets it; the
// others wait here until it is done.
static void begin_tokens(Pass *p) {
    if (p->n == 1 && p->n_threads > 1) {
        p->first = 0;
        p->end = arrive(p);
        return;
    }
    // whole tiles, so that no two threads write to the same cache line
    size_t tiles = (p->n + TILE - 1) / TILE, end = tiles * (p->thread + 1) / p->n_threads * TILE;
    p->first = tiles * p->thread / p->n_threads * TILE;
    p->end = end < p->n ? end : p->n;
    wait_for_all(p);
}

// End per-token work: wait until all threads are done with their tokens.
static void end_tokens(Pass *p) {
    if (p->n > 1 || p->n_threads == 1) wait_for_all(p);
    else if (p->end) release_threads(p->m);
}

// Compute this thread's share of the rows of n products.
static void multiply(Pass *p, const Product *products, size_t n) {
    size_t total = 0, before = 0, threads = p->n_threads;
    for (size_t i = 0; i < n; i++) total += (products[i].w->rows + LANES - 1) / LANES;
    size_t first = total * p->thread / threads, last = total * (p->thread + 1) / threads;
    for (size_t i = 0; i < n; i++) {
        size_t count = (products[i].w->rows + LANES - 1) / LANES;
        size_t end = before + count, from = first > before ? first : before;
        size_t to = last < end ? last : end;
        if (from < to) p->m->kernels->matmul(&products[i], from - before, to - before);
        before = end;
    }
}

// ---- Per-token work

static void add(float *x, const float *y, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] += y[i];
}

static void norm(const Model *m, float *out, const float *x, const float *gain, size_t n) {
    m->kernels->rmsnorm(out, x, gain, n, m->config.norm_eps);
}

// Row i of an input is complete: quantize it if its matrix w is quantized.
static void finish_input(const Model *m, Input *in, const Tensor *w, size_t i) {
    if (w->group) m->kernels->quantize(in, i, w->cols, w->group, (int)FORMATS[w->format].zero);
}

static void embedding_of(const Model *m, float *out, int token) {
    read_row(out, m->weights.tok_embeddings, (size_t)token);
    if (has(&m->config, EMBEDDING_NORM))
        norm(m, out, out, m->weights.embedding_norm, m->config.dim);
}

// The row of the bigram table for a token and the previous one, as in bigram_hash() of model.py.
static size_t bigram_hash(int previous, int token, int rows) {
    if (previous < 0) return 0;
    return 1 + (((uint64_t)previous * 36313) ^ ((uint64_t)token * 27191)) % ((uint64_t)rows - 1);
}

// x (dim) = the embedding of a token, plus SMEAR and bigram embeddings if used; tmp (dim): scratch.
static void embed(const Model *m, float *x, float *tmp, const BatchToken *s) {
    const Config *c = &m->config;
    embedding_of(m, x, s->token);
    if (has(c, SMEAR) && s->previous >= 0) {
        float gate = m->kernels->gate(m->weights.smear_gate, x, c->dim);
        embedding_of(m, tmp, s->previous);
        for (int i = 0; i < c->dim; i++) x[i] += gate * tmp[i];
    }
    if (c->bigram_rows) {
        read_row(tmp, m->weights.bigram, bigram_hash(s->previous, s->token, c->bigram_rows));
        add(x, tmp, c->dim);
    }
}

// Apply QK_NORM, if set, and RoPE: rotate neighbouring pairs of a head by the angles of pos.
static void norm_and_rotate(const Model *m, float *head, const float *gain, int pos) {
    int half = m->config.dim / m->config.n_heads / 2;
    const float *cos = m->rope_cos + (size_t)pos * half, *sin = m->rope_sin + (size_t)pos * half;
    if (has(&m->config, QK_NORM)) norm(m, head, head, gain, 2 * half);
    for (int i = 0; i < half; i++) {
        float a = head[2 * i], b = head[2 * i + 1];
        head[2 * i] = a * cos[i] - b * sin[i];
        head[2 * i + 1] = a * sin[i] + b * cos[i];
    }
}

static void write_cache(const Model *m, uint8_t *cache, size_t at, float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits = isnan(x) ? bits | 1 << 22 : bits + 0x7FFF + (bits >> 16 & 1);  // ties to even
    if (m->bf16_cache) ((uint16_t *)cache)[at] = (uint16_t)(bits >> 16);
    else ((float *)cache)[at] = x;
}

// Compute attention for one key/value head and its query heads, for tokens first to last
// (exclusive) of one story. All their keys and values are cached first.
static void attend_head(Pass *p, size_t layer, size_t head, size_t first, size_t last) {
    Model *m = p->m;
    const Config *c = &m->config;
    const Weights *w = &m->weights;
    size_t head_dim = c->dim / c->n_heads, group = c->n_heads / c->n_kv_heads;
    size_t padded_dim = ROUND_UP(head_dim, LANES), size = m->bf16_cache ? 2 : 4;
    size_t index = ((size_t)p->batch[first].story * c->n_layers + layer) * c->n_kv_heads + head;
    size_t n_padded = ROUND_UP(m->n_positions, LANES);
    uint8_t *keys = m->keys + index * n_padded * head_dim * size;
    uint8_t *values = m->values + index * n_padded * padded_dim * size;
    float *out = m->scratch + p->thread * m->width;
    for (size_t i = first; i < last; i++) {
        size_t pos = p->batch[i].pos;
        size_t at = i * m->width + head * head_dim;
        float *k = m->k + at, *v = m->v + at;
        norm_and_rotate(m, k, row_of(w->k_norm, layer, head_dim), (int)pos);
        if (pos % LANES == 0) {  // already zero, but writing before reading saves a page fault
            memset(keys + pos * head_dim * size, 0, LANES * head_dim * size);
            memset(values + pos * padded_dim * size, 0, LANES * padded_dim * size);
        }
        for (size_t d = 0; d < head_dim; d++) {
            write_cache(m, keys, (pos / LANES * head_dim + d) * LANES + pos % LANES, k[d]);
            write_cache(m, values, pos * padded_dim + d, v[d]);
        }
    }
    for (size_t i = first; i < last; i++) {
        size_t pos = p->batch[i].pos, window = w->windows[layer];
        for (size_t h = head * group; h < (head + 1) * group; h++) {
            float *q = m->q + i * m->width + h * head_dim;
            norm_and_rotate(m, q, row_of(w->q_norm, layer, head_dim), (int)pos);
            m->kernels->attend(out, q, keys, values, head_dim,
                               window && window <= pos ? pos + 1 - window : 0, pos, m->bf16_cache);
            memcpy(m->mixed.x + i * m->width + h * head_dim, out, head_dim * sizeof *out);
        }
    }
}

// Compute the buffer `mixed` from q, k and v, for this thread's share of the heads of each story.
static void attention(Pass *p, size_t layer) {
    Model *m = p->m;
    size_t kv_heads = m->config.n_kv_heads, item = 0;
    for (size_t first = 0, last; first < p->n; first = last) {
        int story = p->batch[first].story;
        for (last = first + 1; last < p->n && p->batch[last].story == story;) last++;
        for (size_t head = 0; head < kv_heads; head++, item++)
            if (item % p->n_threads == (size_t)p->thread) attend_head(p, layer, head, first, last);
    }
}

// The forward pass of n tokens. Every thread runs it and computes its share of the rows of each
// product, of the heads, or of the tokens. Token i uses row i of each buffer (n, ...).
static void forward(Pass *p) {
    Model *m = p->m;
    const Config *c = &m->config;
    const Weights *w = &m->weights;
    const size_t n_layers = c->n_layers, dim = c->dim, width = m->width, hidden = m->hidden;
    const bool gated = is_gated(c->activation);

    for (size_t l = 0; l < n_layers; l++) {
        // x (n, dim) = the embedding, or x + added; normed (n, dim) = rmsnorm(x)
        begin_tokens(p);
        for (size_t i = p->first; i < p->end; i++) {
            float *x = m->x + i * width, *x0 = m->x0 + i * width, *added = m->added + i * width;
            if (l == 0) {
                embed(m, x, added, &p->batch[i]);
                memcpy(x0, x, dim * sizeof *x);
            } else {
                add(x, added, dim);
            }
            if (has(c, RESIDUAL_SCALARS))
                for (size_t d = 0; d < dim; d++)
                    x[d] = w->x_scale[l] * x[d] + w->x0_scale[l] * x0[d];
            norm(m, m->normed.x + i * width, x, row_of(w->attention_norm, l, dim), dim);
            finish_input(m, &m->normed, &w->wq[l], i);
        }
        end_tokens(p);

        // q (n, n_heads * head_dim) = normed @ wq^T; k and v (n, n_kv_heads * head_dim) likewise
        multiply(p, (Product[]){{&w->wq[l], &m->normed, m->q, width},
                                {&w->wk[l], &m->normed, m->k, width},
                                {&w->wv[l], &m->normed, m->v, width}}, 3);
        if (l < (size_t)c->value_embeddings) {  // v += the value embedding of the token
            begin_tokens(p);
            for (size_t i = p->first; i < p->end; i++) {
                float *row = m->added + i * width;
                read_row(row, &w->value_embeddings[l], (size_t)p->batch[i].token);
                add(m->v + i * width, row, w->value_embeddings[l].cols);
            }
            end_tokens(p);
        } else {
            wait_for_all(p);
        }

        // RoPE; in each head, mixed (n, head_dim) = softmax(q @ k^T / sqrt(head_dim)) @ v
        attention(p, l);
        begin_tokens(p);
        for (size_t i = p->first; i < p->end; i++) finish_input(m, &m->mixed, &w->wo[l], i);
        end_tokens(p);
        // added (n, dim) = mixed @ wo^T
        multiply(p, (Product[]){{&w->wo[l], &m->mixed, m->added, width}}, 1);

        // x += added; normed = rmsnorm(x)
        begin_tokens(p);
        for (size_t i = p->first; i < p->end; i++) {
            float *x = m->x + i * width;
            add(x, m->added + i * width, dim);
            norm(m, m->normed.x + i * width, x, row_of(w->ffn_norm, l, dim), dim);
            finish_input(m, &m->normed, &w->w1[l], i);
        }
        end_tokens(p);

        // inner (n, hidden_dim) = silu(normed @ w1^T) * (normed @ w3^T), or relu(normed @ w1^T)^2
        const Tensor *w3 = gated ? &w->w3[l] : NULL;
        multiply(p, (Product[]){{&w->w1[l], &m->normed, m->inner.x, hidden},
                                {w3, &m->normed, m->gate, hidden}}, gated ? 2 : 1);
        begin_tokens(p);
        for (size_t i = p->first; i < p->end; i++) {
            const float *gate = gated ? m->gate + i * hidden : NULL;
            m->kernels->activate(c->activation, m->inner.x + i * hidden, gate, c->hidden_dim);
            finish_input(m, &m->inner, &w->w2[l], i);
        }
        end_tokens(p);
        // added (n, dim) = inner @ w2^T
        multiply(p, (Product[]){{&w->w2[l], &m->inner, m->added, width}}, 1);
    }

    // x += added; wanted (n_wanted, dim) = rmsnorm(x) of the tokens that want logits
    begin_tokens(p);
    for (size_t i = p->first; i < p->end; i++) {
        float *x = m->x + i * width;
        add(x, m->added + i * width, dim);
        if (!p->batch[i].wants_logits) continue;
        size_t row = 0;
        for (size_t j = 0; j < i; j++) row += p->batch[j].wants_logits;
        norm(m, m->wanted.x + row * width, x, w->norm, dim);
        finish_input(m, &m->wanted, w->output, row);
    }
    end_tokens(p);
    if (!p->n_wanted) return;

    // logits (n_wanted, vocab_size) = wanted @ output^T; with a softcap c, c * tanh(logits / c)
    multiply(p, (Product[]){{w->output, &m->wanted, m->logits, logits_stride(m)}}, 1);
    if (c->logit_softcap > 0.0f) {
        begin_tokens(p);
        for (size_t i = p->first; i < p->end && i < p->n_wanted; i++)
            m->kernels->softcap(logits_of(m, i), c->vocab_size, c->logit_softcap);
        end_tokens(p);
    }
}

// Adjust the number of threads after a pass that took `time` seconds, `lost` of them waiting for a
// thread that was not running. If most of the recent time was lost, other programs are using the
// cores: halve the threads, and after a while try doubling them. The number of threads changes no
// bit of the results.
static void adjust_threads(Model *m, double time, double lost) {
    m->spent += time;
    m->wasted += lost;
    bool is_busy = m->spent > 0.01 && m->wasted > m->spent / 2;
    if (m->n_passes < MAX_PATIENCE) m->n_passes++;
    if (m->spent > 0.02) {  // older passes count less
        m->spent /= 2;
        m->wasted /= 2;
    }
    if (is_busy) {
        m->n_active /= 2;
        if (m->patience < MAX_PATIENCE) m->patience *= 2;
    } else if (m->n_active < m->n_threads && m->n_passes >= m->patience) {
        m->n_active = 2 * m->n_active < m->n_threads ? 2 * m->n_active : m->n_threads;
    } else {
        if (m->n_passes >= MAX_PATIENCE) m->patience = MIN_PATIENCE;
        return;
    }
    m->n_passes = 0;
    m->spent = m->wasted = 0.0;
}

// Fill the RoPE tables for at least the first n positions. They grow on demand because most of a
// long context is never used. The angles are doubles, so different libms almost always agree.
static void fill_rope(Model *m, size_t n) {
    if (n <= m->n_rope) return;
    size_t head_dim = m->config.dim / m->config.n_heads, half = head_dim / 2;
    if (n < 2 * m->n_rope) n = 2 * m->n_rope;
    if (n < MIN_ROPE) n = MIN_ROPE;
    if (n > m->n_positions) n = m->n_positions;
    for (size_t i = 0; i < half; i++) {
        double freq = pow(m->config.rope_theta, -(double)(2 * i) / (double)head_dim);
        for (size_t pos = m->n_rope; pos < n; pos++) {
            m->rope_cos[pos * half + i] = (float)cos((double)pos * freq);
            m->rope_sin[pos * half + i] = (float)sin((double)pos * freq);
        }
    }
    m->n_rope = n;
}

// Run a batch of n <= max_batch tokens through the model. Earlier tokens are in the cache.
static void run_batch(Model *m, const BatchToken *batch, size_t n) {
    Pass p = {.m = m, .batch = batch, .n = n, .n_threads = 1};
    size_t end_pos = 0;
    for (size_t i = 0; i < n; i++) {
        p.n_wanted += batch[i].wants_logits;
        if ((size_t)batch[i].pos >= end_pos) end_pos = (size_t)batch[i].pos + 1;
    }
    fill_rope(m, end_pos);
    set_rows(&m->normed, n);
    set_rows(&m->mixed, n);
    set_rows(&m->inner, n);
    set_rows(&m->wanted, p.n_wanted);
    if (m->n_active == 1) {
        if (m->n_threads > 1) adjust_threads(m, 0.0, 0.0);
        forward(&p);
        return;
    }
    double start = seconds(), end = start, lost = 0.0;
    OMP(parallel num_threads(m->n_active) firstprivate(p) reduction(max : lost))
    {
        p.n_threads = omp_get_num_threads();  // may be fewer than n_active
        p.thread = omp_get_thread_num();
        forward(&p);
        lost = p.lost;
        if (p.thread == 0) end = seconds();
    }
    double now = seconds();
    if (now - end > 1e-4) lost += now - end;  // waiting for the others to finish
    adjust_threads(m, now - start, lost);
}

// The number of threads: `wanted`, or if that is 0, the machine's, limited so that each thread has
// MIN_WORK multiplications per token. With less work, waiting costs more than sharing saves.
static int pick_threads(const Config *c, int wanted) {
#if !defined(_OPENMP)
    wanted = 1;
#endif
    uint64_t work = (uint64_t)c->n_layers * c->dim * (2 * (uint64_t)c->dim + 2 * c->hidden_dim) +
                    (uint64_t)c->vocab_size * c->dim;
    uint64_t limit = omp_get_max_threads() < MAX_THREADS ? omp_get_max_threads() : MAX_THREADS;
    if (wanted) return wanted < MAX_THREADS ? wanted : MAX_THREADS;
    return (int)(work / MIN_WORK < 1 ? 1 : work / MIN_WORK < limit ? work / MIN_WORK : limit);
}

// Find the weights in the file. Its size must be exactly what its header requires.
static void load_weights(Model *m) {
    const Config *c = &m->config;
    const File *f = &m->file;
    Walk walk = {.config = c, .at = c->header_size, .alignment = 1};
    if (c->version == 3) {
        walk.at += c->n_layers * sizeof(int32_t);  // the windows
        walk.alignment = ALIGNMENT;
    }
    Walk measure = walk;
    uint64_t needs = lay_out(&m->weights, &measure);
    if (c->file_size != f->size) needs = c->file_size;
    if (needs != f->size)
        die("%s is %s or not a version %d model.bin: it has %zu bytes, but its header (dim %d, %d "
            "layers, vocabulary %d) %s %llu; copy or export it again", f->path,
            f->size < needs ? "truncated" : "too long", c->version, f->size, c->dim, c->n_layers,
            c->vocab_size, c->file_size != f->size ? "says" : "needs", (unsigned long long)needs);
    walk.data = f->data;
    if (c->version == 0 && f->size <= MAX_COPY) {
        // the short header would make every vector straddle two cache lines
        size_t shift = ALIGNMENT - c->header_size;
        walk.data = memcpy((uint8_t *)alloc(f->size + shift, 1) + shift, f->data, f->size);
    }
    lay_out(&m->weights, &walk);
    m->matrix_bytes = walk.matrix_bytes;

    int32_t *windows = alloc(c->n_layers, sizeof *windows);
    m->weights.windows = windows;
    if (c->version == 3) memcpy(windows, f->data + HEADER_BYTES, c->n_layers * sizeof *windows);
    for (int l = 0; l < c->n_layers; l++)
        if (windows[l] < 0 || windows[l] > MAX_CONTEXT)
            die("%s is not a version 3 model.bin: layer %d has a window of %d, expected 0 to %d; "
                "export it again", f->path, l, windows[l], MAX_CONTEXT);
}

// Bytes of memory that this process may use: the machine's, or its container's if that is less.
static double memory_limit(void) {
    double limit = HUGE_VAL;
#if defined(IS_POSIX)
    double group;
    long pages = sysconf(_SC_PHYS_PAGES), size = sysconf(_SC_PAGESIZE);
    if (pages > 0 && size > 0) limit = (double)pages * (double)size;
    FILE *f = fopen("/sys/fs/cgroup/memory.max", "r");
    if (f && fscanf(f, "%lf", &group) == 1 && group < limit) limit = group;
    if (f) fclose(f);
#endif
    return limit;
}

// Refuse a key/value cache that does not fit in memory. The system provides memory on the first
// write, and would otherwise kill the program in the middle of a story.
static void check_memory(const Model *m) {
    const Config *c = &m->config;
    double values = 2.0 * m->n_stories * c->n_layers * c->n_kv_heads * (c->dim / c->n_heads);
    double bytes = values * (m->bf16_cache ? 2 : 4) * (double)m->n_positions;
    if (bytes > memory_limit())
        die("not enough memory for the keys and values of %zu positions%s: they need %.1f GB, and "
            "there are %.1f GB; use fewer positions (-n)%s", m->n_positions,
            m->n_stories > 1 ? " per story" : "", bytes / 1e9, memory_limit() / 1e9,
            m->n_stories > 1 ? " or stories (-b)" : "");
}

static void alloc_buffers(Model *m) {
    const Config *c = &m->config;
    size_t head_dim = c->dim / c->n_heads;
    float **buffers[] = {&m->x, &m->x0, &m->added, &m->q, &m->k, &m->v};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++)
        *buffers[i] = alloc(m->max_batch * m->width, sizeof(float));
    m->gate = alloc(m->max_batch * m->hidden, sizeof(float));
    m->scratch = alloc(m->n_threads * m->width, sizeof(float));
    m->normed = new_input(m, m->width);
    m->wanted = new_input(m, m->width);
    m->mixed = new_input(m, m->width);
    m->inner = new_input(m, m->hidden);
    m->logits = alloc(m->max_wanted, logits_stride(m) * sizeof(float));
    uint64_t heads = (uint64_t)m->n_stories * c->n_layers * c->n_kv_heads;
    uint64_t rows = heads * ROUND_UP(m->n_positions, LANES);
    size_t size = m->bf16_cache ? sizeof(uint16_t) : sizeof(float);
    m->keys = alloc(rows, head_dim * size);
    m->values = alloc(rows, ROUND_UP(head_dim, LANES) * size);
    m->rope_cos = alloc((uint64_t)m->n_positions * (head_dim / 2), sizeof(float));
    m->rope_sin = alloc((uint64_t)m->n_positions * (head_dim / 2), sizeof(float));
}

// Load a model, with room for n_stories of n_positions each (0: the whole context), and for the
// logits of all tokens of a batch, or of one per story.
static Model load_model(File file, int n_positions, int n_stories, bool wants_all, int n_threads,
                        bool bf16_cache, bool is_fast) {
    Model m = {.file = file, .config = read_header(&file), .kernels = pick_kernels(),
               .bf16_cache = bf16_cache, .is_fast = is_fast, .n_stories = (size_t)n_stories};
    const Config *c = &m.config;
    check_config(c, file.path);
    load_weights(&m);
    m.n_positions = n_positions && n_positions < c->seq_len ? n_positions : c->seq_len;
    m.max_batch = m.n_positions < MAX_BATCH ? m.n_positions : MAX_BATCH;
    if (m.max_batch < m.n_stories) m.max_batch = m.n_stories;
    m.max_wanted = wants_all ? m.max_batch : m.n_stories;
    m.width = ROUND_UP((size_t)c->dim, LANES);
    m.hidden = ROUND_UP((size_t)c->hidden_dim, LANES);
    m.n_threads = m.n_active = pick_threads(c, n_threads);
    m.patience = MIN_PATIENCE;
    check_memory(&m);
    alloc_buffers(&m);
    return m;
}

// ------------------------------------------------------------------------------------------------
// The tokenizer: SentencePiece BPE or byte-level BPE, from a file written by tokenizer.py. Both cut
// a text into symbols (characters or bytes) and merge neighbours, best pair first.

enum { UNK = 0, FIRST_PIECE = 3 };  // of SentencePiece; its BOS is 1, its EOS is 2
enum { OTHER = 1, LETTER = 2, NUMBER = 4, BLANK = 8, NEWLINE = 16, CODE_POINTS = 0x110000 };

typedef struct {
    const uint8_t *bytes;  // in the file; spaces are plain, not U+2581
    size_t length;
    float score;  // the highest is merged first
    int id;
} Piece;

typedef struct {
    File file;
    int vocab_size, bos, eos;
    Piece *pieces;        // (vocab_size)
    int byte_id[256];     // the token of each byte, or -1
    bool byte_fallback;   // every byte has a token
    const Piece **table;  // hash table of merge results, NULL where free; the key is the result's
                          // bytes for SentencePiece, the two merged ids for byte-level BPE
    size_t table_size;    // a power of two
    bool is_byte_level;   // the fields below are for byte-level BPE
    bool is_gpt4;         // the pre-token pattern, see PATTERNS of bpe.py
    uint8_t *kinds;       // (CODE_POINTS) the kind of each character: OTHER, LETTER, ...
    const Piece **special;  // (n_special) tokens matched whole in a text, never cut or merged
    size_t n_special;
    bool starts_special[256];  // whether a special token starts with this byte
} Tokenizer;

// A bounds-checked cursor over untrusted bytes.
typedef struct {
    const File *file;
    size_t at;
} Cursor;

static const uint8_t *take(Cursor *c, size_t n) {
    if (n > c->file->size - c->at)
        die("%s is truncated or not a tokenizer file: at byte %zu it needs %zu bytes but has %zu; "
            "write it again with tokenizer.py", c->file->path, c->at, n, c->file->size - c->at);
    c->at += n;
    return c->file->data + c->at - n;
}

static uint32_t take_number(Cursor *c, const char *name, size_t min, size_t max) {
    uint32_t n;
    memcpy(&n, take(c, 4), 4);
    if (n < min || n > max)
        die("%s is damaged: at byte %zu the %s is %u, expected %zu to %zu; write it again with "
            "tokenizer.py", c->file->path, c->at - 4, name, n, min, max);
    return n;
}

_Noreturn static void die_damaged(const Tokenizer *t, const char *part, size_t i,
                                  const char *problem) {
    die("%s is damaged: %s %zu %s; write it again with tokenizer.py", t->file.path, part, i,
        problem);
}

static void check_n_pieces(const Tokenizer *t, size_t n) {
    if (n != (size_t)t->vocab_size)
        die("%s has %zu pieces, but the model's vocabulary has %d: "
            "use the tokenizer that the model was trained with (-z)", t->file.path, n,
            t->vocab_size);
}

static void make_table(Tokenizer *t, size_t n) {
    for (t->table_size = 4; t->table_size < 2 * n;) t->table_size *= 2;
    t->table = alloc(t->table_size, sizeof *t->table);
}

// The slot of a key in the table, or the free slot where it belongs.
static const Piece **find_slot(const Tokenizer *t, const void *bytes, size_t n) {
    uint64_t hash = 1469598103934665603u;  // FNV-1a
    for (size_t i = 0; i < n; i++) hash = (hash ^ ((const uint8_t *)bytes)[i]) * 1099511628211u;
    size_t slot = (hash ^ (hash >> 32)) & (t->table_size - 1);
    for (const Piece *p; (p = t->table[slot]); slot = (slot + 1) & (t->table_size - 1))
        if (p->length == n && !memcmp(p->bytes, bytes, n)) break;
    return &t->table[slot];
}

// The byte that a piece of the form <0xNN> stands for, or -1.
static int byte_of_piece(const Piece *p) {
    static const char digits[] = "0123456789ABCDEF";
    if (p->length != 6 || memcmp(p->bytes, "<0x", 3) || p->bytes[5] != '>') return -1;
    const char *high = memchr(digits, p->bytes[3], 16), *low = memchr(digits, p->bytes[4], 16);
    return high && low ? (int)(16 * (high - digits) + (low - digits)) : -1;
}

static void load_sentencepiece(Tokenizer *t, Cursor *c) {
    size_t n = 0;
    t->bos = 1;
    t->eos = 2;
    for (; c->at < t->file.size; n++) {
        Piece p = {.id = (int)n};
        memcpy(&p.score, take(c, 4), 4);
        p.length = take_number(c, "length", 0, UINT32_MAX);
        p.bytes = take(c, p.length);
        if (isnan(p.score)) die_damaged(t, "piece", n, "has NaN as its score");
        if (n < (size_t)t->vocab_size) t->pieces[n] = p;
    }
    check_n_pieces(t, n);
    make_table(t, n);
    for (int id = FIRST_PIECE; id < t->vocab_size; id++) {
        const Piece *p = &t->pieces[id];
        int byte = byte_of_piece(p);
        if (byte >= 0) t->byte_id[byte] = id;  // never matched by text
        else *find_slot(t, p->bytes, p->length) = p;
    }
}

// Length in bytes of the UTF-8 character at p, with n > 0 bytes left, or 0 if it is invalid.
static size_t utf8_length(const uint8_t *p, size_t n) {
    if (p[0] < 0x80) return 1;
    size_t length = p[0] >= 0xF0 && p[0] <= 0xF4 ? 4 : p[0] >= 0xE0 && p[0] < 0xF0 ? 3
                  : p[0] >= 0xC2 && p[0] < 0xE0 ? 2 : 0;
    if (!length || n < length) return 0;
    for (size_t i = 1; i < length; i++)
        if ((p[i] & 0xC0) != 0x80) return 0;
    // invalid: overlong forms, surrogates, beyond U+10FFFF
    if ((p[0] == 0xE0 && p[1] < 0xA0) || (p[0] == 0xED && p[1] > 0x9F) ||
        (p[0] == 0xF0 && p[1] < 0x90) || (p[0] == 0xF4 && p[1] > 0x8F)) return 0;
    return length;
}

// Length in bytes of the longest valid UTF-8 prefix of a text.
static size_t valid_utf8(const void *text, size_t n) {
    size_t at = 0;
    for (size_t size = 1; size && at < n; at += size)
        size = utf8_length((const uint8_t *)text + at, n - at);
    return at;
}

// Whether n bytes that are not a whole character could start one.
static bool utf8_may_continue(const uint8_t *p, size_t n) {
    uint8_t fill[4] = {p[0], p[0] == 0xE0 ? 0xA0 : p[0] == 0xF0 ? 0x90 : 0x80, 0x80, 0x80};
    memcpy(fill, p, n < 4 ? n : 4);
    return utf8_length(fill, 4) > n;
}

// The file's layout is that of byte_level_c_file() in tokenizer.py.
static void load_byte_level(Tokenizer *t, Cursor *c) {
    t->is_byte_level = true;
    t->is_gpt4 = take_number(c, "pattern", 0, 1);
    size_t top = (size_t)t->vocab_size - 1;
    Cursor ends = *c;  // BOS and EOS, read after the vocabulary's size is checked
    take(c, 2 * 4);
    check_n_pieces(t, take_number(c, "number of tokens", 0, UINT32_MAX));
    t->bos = (int)take_number(&ends, "bos", 0, top);
    t->eos = (int)take_number(&ends, "eos", 0, top);
    size_t n_merges = take_number(c, "number of merges", 0, 1 << 24);  // ranks are floats
    t->n_special = take_number(c, "number of special tokens", 0, top + 1);
    size_t n_ranges = take_number(c, "number of ranges", 0, CODE_POINTS);

    t->kinds = alloc(CODE_POINTS, 1);
    memset(t->kinds, OTHER, CODE_POINTS);
    for (size_t i = 0, next = 0; i < n_ranges; i++) {
        size_t first = take_number(c, "start of a range", next, CODE_POINTS - 1);
        size_t last = take_number(c, "end of a range", first, CODE_POINTS - 1);
        memset(t->kinds + first, 1 << take_number(c, "class of a range", 1, 3), last - first + 1);
        next = last + 1;
    }
    t->kinds[' '] = BLANK;  // the patterns treat these specially
    t->kinds['\n'] = t->kinds['\r'] = NEWLINE;

    Cursor special = *c, merges = *c;  // read after the tokens
    take(c, 4 * t->n_special);
    merges.at = c->at;
    take(c, 3 * 4 * n_merges);
    for (int i = 0; i < t->vocab_size; i++) {
        size_t length = take_number(c, "length", 0, UINT32_MAX);
        t->pieces[i] = (Piece){.bytes = take(c, length), .length = length, .id = i};
        if (length == 1) t->byte_id[*t->pieces[i].bytes] = i;
    }
    if (c->at < t->file.size) die_damaged(t, "byte", c->at, "follows the last token");
    for (size_t b = 0; b < 256; b++)
        if (t->byte_id[b] < 0) die_damaged(t, "byte value", b, "has no token");

    t->special = alloc(t->n_special, sizeof *t->special);
    for (size_t i = 0; i < t->n_special; i++) {
        const Piece *p = t->special[i] = &t->pieces[take_number(&special, "special token", 0, top)];
        if (!p->length || valid_utf8(p->bytes, p->length) < p->length)
            die_damaged(t, "special token", (size_t)p->id, "is empty or invalid UTF-8");
        t->starts_special[*p->bytes] = true;
    }
    make_table(t, n_merges);
    Piece *merged = alloc(n_merges, sizeof *merged);
    for (size_t i = 0; i < n_merges; i++) {
        const uint8_t *ids = merges.file->data + merges.at;
        const Piece *left = &t->pieces[take_number(&merges, "left token of a merge", 0, top)];
        const Piece *right = &t->pieces[take_number(&merges, "right token of a merge", 0, top)];
        const Piece *both = &t->pieces[take_number(&merges, "token of a merge", 0, top)];
        if (!left->length || !right->length || both->length != left->length + right->length ||
            memcmp(both->bytes, left->bytes, left->length) ||
            memcmp(both->bytes + left->length, right->bytes, right->length))
            die_damaged(t, "merge", i, "does not join its tokens");
        merged[i] = (Piece){ids, 8, -(float)i, both->id};
        *find_slot(t, ids, 8) = &merged[i];
    }
}

// The CRC-32 of zlib and PNG, four bits at a time.
static uint32_t crc32(const uint8_t *p, size_t n) {
    static const uint32_t table[16] = {
        0x00000000, 0x1db71064, 0x3b6e20c8, 0x26d930ac, 0x76dc4190, 0x6b6b51f4, 0x4db26158,
        0x5005713c, 0xedb88320, 0xf00f9344, 0xd6d6a3e8, 0xcb61b38c, 0x9b64c2b0, 0x86d3d2d4,
        0xa00ae278, 0xbdbdf21c,
    };
    uint32_t crc = ~0u;
    for (size_t i = 0; i < n; i++) {
        crc = table[(crc ^ p[i]) & 15] ^ crc >> 4;
        crc = table[(crc ^ p[i] >> 4) & 15] ^ crc >> 4;
    }
    return ~crc;
}

// A tokenizer's fingerprint in a model's header: the CRC-32 of its file without the character
// classes, which change with Unicode's versions; never 0. As in fingerprint_of() of tokenizer.py.
static uint32_t fingerprint(const Tokenizer *t) {
    size_t at = 0;
    if (t->is_byte_level) {
        uint32_t n_ranges;
        memcpy(&n_ranges, t->file.data + 28, sizeof n_ranges);
        at = 32 + 12 * (size_t)n_ranges;
    }
    uint32_t crc = crc32(t->file.data + at, t->file.size - at);
    return crc ? crc : 1;
}

// Refuse a tokenizer that the model was not trained with.
static void check_tokenizer(const Tokenizer *t, const Config *c, const char *model_path) {
    if (c->tokenizer && c->tokenizer != fingerprint(t))
        die("%s was trained with a tokenizer other than %s: use the model's own tokenizer (-z)",
            model_path, t->file.path);
}

// Load a tokenizer. It must have vocab_size pieces, like the model.
static Tokenizer load_tokenizer(File file, int vocab_size) {
    Tokenizer t = {.file = file, .vocab_size = vocab_size, .byte_fallback = true};
    Cursor cursor = {.file = &t.file};
    t.pieces = alloc(vocab_size, sizeof(Piece));
    for (int b = 0; b < 256; b++) t.byte_id[b] = -1;
    // SentencePiece's file starts with the length of its longest piece, which is not needed
    bool is_byte_level = !memcmp(take(&cursor, 4), "bpe1", 4);
    (is_byte_level ? load_byte_level : load_sentencepiece)(&t, &cursor);
    for (int b = 0; b < 256; b++) t.byte_fallback = t.byte_fallback && t.byte_id[b] >= 0;
    return t;
}

typedef struct {
    const uint8_t *bytes;
    size_t length;        // 0 once it is merged into its left neighbour
    int prev, next;       // neighbours, -1 at the ends
    int id;               // its token, -1 if the vocabulary lacks it
    const Piece *merged;  // the result of merging it with the next one, or NULL
} Symbol;

// Prepare a text to be cut into symbols. Invalid UTF-8 becomes U+FFFD: one per incomplete character
// as in Python, or one per byte as in SentencePiece, which also adds a space in front and reads
// U+2581 as a space. Returns the bytes and sets *n to their number.
static uint8_t *normalize(const Tokenizer *t, const char *text, size_t left, size_t *n) {
    const uint8_t *in = (const uint8_t *)text;
    size_t at = 0;
    uint8_t *out = alloc(3 * (uint64_t)left + 1, 1);  // an invalid byte grows to three
    if (left && !t->is_byte_level) out[at++] = ' ';
    for (size_t length; left; in += length, left -= length) {
        const void *from = in;
        size_t size = length = utf8_length(in, left);
        if (!length) {
            from = "\xEF\xBF\xBD", size = 3, length = 1;
            while (t->is_byte_level && length < left && utf8_may_continue(in, length + 1)) length++;
        } else if (!t->is_byte_level && length == 3 && !memcmp(in, "\xE2\x96\x81", 3)) {
            from = " ", size = 1;
        }
        memcpy(out + at, from, size);
        at += size;
    }
    *n = at;
    return out;
}

// Cut a text into symbols for SentencePiece: its characters. Returns their number.
static size_t cut_characters(const Tokenizer *t, const uint8_t *p, size_t n_bytes, Symbol *s) {
    size_t n = 0;
    for (size_t at = 0; at < n_bytes; at += s[n++].length) {
        size_t size = utf8_length(p + at, n_bytes - at);
        const Piece *piece = *find_slot(t, p + at, size);
        s[n] = (Symbol){p + at, size, (int)n - 1, (int)n + 1, piece ? piece->id : -1, NULL};
    }
    if (n) s[n - 1].next = -1;
    return n;
}

// How many bytes at p belong to characters of these kinds, up to max_chars characters.
static size_t span(const Tokenizer *t, const uint8_t *p, size_t n, int kinds, size_t max_chars) {
    size_t at = 0;
    for (size_t size; at < n && max_chars > 0; at += size, max_chars--) {
        size = utf8_length(p + at, n - at);
        uint32_t code = p[at] & (size == 1 ? 0x7F : 0x7F >> size);
        for (size_t i = 1; i < size; i++) code = code << 6 | (p[at + i] & 0x3F);
        if (!(t->kinds[code] & kinds)) break;
    }
    return at;
}

// Length in bytes of a contraction such as 've at p, or 0. With any_case, U+017F is also an s.
static size_t contraction(const uint8_t *p, size_t n, bool any_case) {
    static const char *const endings[] = {"s", "d", "m", "t", "ll", "ve", "re", "\xC5\xBF"};
    for (size_t e = 0; n && *p == '\'' && e < (any_case ? 8 : 7); e++) {
        size_t length = strlen(endings[e]), i = 0;
        for (; i < length && i + 1 < n; i++) {
            bool is_upper = any_case && p[i + 1] >= 'A' && p[i + 1] <= 'Z';
            if (p[i + 1] + (is_upper ? 'a' - 'A' : 0) != (uint8_t)endings[e][i]) break;
        }
        if (i == length) return 1 + length;
    }
    return 0;
}

// Length in bytes of the pre-token at p: the first alternative in PATTERNS of bpe.py that matches.
// Runs are as long as possible, except that white space ends at its last newline (GPT-4) or leaves
// its last character to the next pre-token.
static size_t pretoken(const Tokenizer *t, const uint8_t *p, size_t n) {
    size_t space = *p == ' ', length = contraction(p, n, t->is_gpt4);
    if (length) return length;
    size_t prefix = t->is_gpt4 ? span(t, p, n, OTHER | BLANK, 1) : space;
    if ((length = span(t, p + prefix, n - prefix, LETTER, n))) return prefix + length;
    prefix = t->is_gpt4 ? 0 : space;
    if ((length = span(t, p + prefix, n - prefix, NUMBER, t->is_gpt4 ? 3 : n)))
        return prefix + length;
    if ((length = span(t, p + space, n - space, OTHER, n))) {
        length += space;
        return length + (t->is_gpt4 ? span(t, p + length, n - length, NEWLINE, n) : 0);
    }
    size_t white = span(t, p, n, BLANK | NEWLINE, n), end = t->is_gpt4 ? white : 0;
    while (end && p[end - 1] != '\n' && p[end - 1] != '\r') end--;
    if (end) return end;
    if (white == n) return n;
    for (end = white - 1; (p[end] & 0xC0) == 0x80;) end--;
    return end ? end : white;  // the last space joins the next pre-token unless it is the only one
}

// The longest special token at p, or NULL.
static const Piece *special_at(const Tokenizer *t, const uint8_t *p, size_t n) {
    const Piece *best = NULL;
    for (size_t i = 0; t->starts_special[*p] && i < t->n_special; i++) {
        const Piece *s = t->special[i];
        if (best && s->length <= best->length) continue;
        if (s->length <= n && !memcmp(s->bytes, p, s->length)) best = s;
    }
    return best;
}

// Cut a text into symbols for byte-level BPE: special tokens, and the bytes of the pre-tokens
// between them, with neighbours only in the same pre-token. Returns the number of symbols.
static size_t cut_bytes(const Tokenizer *t, const uint8_t *p, size_t n_bytes, Symbol *s) {
    size_t n = 0;
    for (size_t at = 0, end = 0; at < n_bytes; at = end) {
        const Piece *special = NULL;
        while (end < n_bytes && !(special = special_at(t, p + end, n_bytes - end))) end++;
        for (size_t size; at < end; at += size) {
            size = pretoken(t, p + at, end - at);
            for (size_t i = 0; i < size; i++, n++)
                s[n] = (Symbol){p + at + i, 1, i ? (int)n - 1 : -1, i + 1 < size ? (int)n + 1 : -1,
                                t->byte_id[p[at + i]], NULL};
        }
        if (!special) break;
        s[n++] = (Symbol){p + end, special->length, -1, -1, special->id, NULL};
        end += special->length;
    }
    return n;
}

// A pair that may be merged (index: its left symbol), or a token that may be sampled.
typedef struct {
    float score;
    int index;
} Candidate;

static bool comes_first(Candidate a, Candidate b) {
    return a.score > b.score || (a.score == b.score && a.index < b.index);
}

// A binary heap of n candidates; pop() returns the one that comes first.
static void push(Candidate *heap, size_t *n, Candidate added) {
    size_t i = (*n)++;
    for (; i > 0 && comes_first(added, heap[(i - 1) / 2]); i = (i - 1) / 2)
        heap[i] = heap[(i - 1) / 2];
    heap[i] = added;
}

static Candidate pop(Candidate *heap, size_t *n) {
    Candidate first = heap[0], moved = heap[--*n];
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < *n; i = child) {
        if (child + 1 < *n && comes_first(heap[child + 1], heap[child])) child++;
        if (!comes_first(heap[child], moved)) break;
        heap[i] = heap[child];
    }
    heap[i] = moved;
    return first;
}

// Look up the merge of symbol i with the next one, and push it if it exists.
static void find_merge(const Tokenizer *t, Symbol *s, int i, Candidate *heap, size_t *n) {
    if (i < 0) return;
    Symbol *l = &s[i];
    l->merged = NULL;
    if (l->next < 0) return;
    const Symbol *r = &s[l->next];
    if (t->is_byte_level) l->merged = *find_slot(t, (int[]){l->id, r->id}, 8);
    else l->merged = *find_slot(t, l->bytes, l->length + r->length);  // neighbours in memory
    if (l->merged) push(heap, n, (Candidate){l->merged->score, i});
}

// A text has up to 3 tokens per byte (1 if it is valid UTF-8), plus a space and a BOS
enum { TOKENS_PER_BYTE = 3, EXTRA_TOKENS = 2 };

// Encode a text: a BOS and its tokens, with the same ids as SentencePiece or bpe.py. Returns them
// as the newest block and sets *n_tokens to their number. O(n log n): a heap has the next merge.
static int *encode(const Tokenizer *t, const char *text, size_t length, size_t *n_tokens) {
    int *tokens = alloc(TOKENS_PER_BYTE * (uint64_t)length + EXTRA_TOKENS, sizeof(int));
    const Block *kept = blocks;
    size_t n_bytes, n_pairs = 0, n_out = 0;
    uint8_t *bytes = normalize(t, text, length, &n_bytes);
    if (n_bytes > INT_MAX) die("the text has %zu bytes: expected less than 700 MB", length);
    Symbol *symbols = alloc(n_bytes, sizeof(Symbol));
    Candidate *heap = alloc(n_bytes, 3 * sizeof(Candidate));  // 1 for each symbol, 2 for each merge
    size_t n = (t->is_byte_level ? cut_bytes : cut_characters)(t, bytes, n_bytes, symbols);
    for (size_t i = 0; i < n; i++) find_merge(t, symbols, (int)i, heap, &n_pairs);
    while (n_pairs) {
        Candidate best = pop(heap, &n_pairs);
        Symbol *l = &symbols[best.index];
        if (!l->merged || l->merged->score != best.score) continue;  // outdated
        Symbol *r = &symbols[l->next];
        l->length += r->length;
        l->id = l->merged->id;
        l->next = r->next;
        *r = (Symbol){0};
        if (l->next >= 0) symbols[l->next].prev = best.index;
        find_merge(t, symbols, l->prev, heap, &n_pairs);
        find_merge(t, symbols, best.index, heap, &n_pairs);
    }

    tokens[n_out++] = t->bos;
    for (const Symbol *s = symbols; s < symbols + n; s++) {
        if (!s->length) continue;
        if (s->id >= 0) {
            tokens[n_out++] = s->id;
        } else if (t->byte_fallback) {
            for (size_t b = 0; b < s->length; b++) tokens[n_out++] = t->byte_id[s->bytes[b]];
        } else if (tokens[n_out - 1] != UNK) {  // a run of unknown characters is one token
            tokens[n_out++] = UNK;
        }
    }
    release_to(kept);
    *n_tokens = n_out;
    return tokens;
}

// Collects bytes and prints whole UTF-8 characters. Invalid bytes are printed as U+FFFD, one per
// incomplete character, as with errors="replace" in Python. On a terminal, control characters other
// than newline and tab are dropped, so that no model can send it commands.
typedef struct {
    FILE *out;            // NULL: write to text instead
    char *text;           // (room)
    size_t room, n_text;  // n_text counts all bytes, even if text has no room for them
    bool is_terminal, is_json;
    bool has_order;       // a space separates the first token from an order
    uint8_t pending[4];   // the start of a character
    size_t n;             // bytes pending
    double flushed;       // time of the last flush, in seconds
} Printer;

static void put(Printer *p, const void *bytes, size_t n) {
    if (p->out) fwrite(bytes, 1, n, p->out);
    for (size_t i = 0; i < n; i++, p->n_text++)
        if (p->n_text < p->room) p->text[p->n_text] = ((const char *)bytes)[i];
}

static void print_bytes(Printer *p, const uint8_t *bytes, size_t n) {
    uint8_t *c = p->pending;
    for (size_t i = 0; i < n; i++) {
        c[p->n++] = bytes[i];
        bool is_whole = utf8_length(c, p->n), is_c1 = p->n == 2 && *c == 0xC2 && c[1] < 0xA0;
        bool is_control = is_c1 || *c == 0x7F || (*c < 0x20 && *c != '\n' && *c != '\t');
        if (!is_whole && utf8_may_continue(c, p->n)) continue;
        if (!is_whole) {
            put(p, "\xEF\xBF\xBD", 3);
            i -= p->n > 1;  // the unexpected byte may start the next character
        } else if (p->is_json && (*c < 0x20 || *c == '"' || *c == '\\')) {
            fprintf(p->out, "\\u%04x", *c);
        } else if (!p->is_terminal || !is_control) {
            put(p, c, p->n);
        }
        p->n = 0;
    }
}

static void print_rest(Printer *p) {
    if (p->n) put(p, "\xEF\xBF\xBD", 3);
    p->n = 0;
}

// Print the text of one token; BOS and EOS have none. The first token of a text loses the space
// that SentencePiece adds in front, or that separates it from an order.
static void print_token(const Tokenizer *t, Printer *printer, int token, bool first) {
    const Piece *p = &t->pieces[token];
    if (token == t->bos || token == t->eos) return;
    int byte = t->is_byte_level || token < FIRST_PIECE ? -1 : byte_of_piece(p);
    if (!t->is_byte_level && token == UNK) {
        print_bytes(printer, (const uint8_t *)" \xE2\x81\x87 ", 5);
    } else if (byte >= 0) {
        print_bytes(printer, &(uint8_t){(uint8_t)byte}, 1);
    } else {
        bool has_space = first && (!t->is_byte_level || printer->has_order);
        size_t skip = has_space && p->length && p->bytes[0] == ' ';
        print_bytes(printer, p->bytes + skip, p->length - skip);
    }
}

// ------------------------------------------------------------------------------------------------
// Sampling the next token

typedef struct { const int *tokens; size_t n; } Phrase;

typedef struct {
    float temperature;     // 0: the most likely token
    float top_p, min_p;    // 1 and 0: all tokens
    float repeat_penalty;  // 1: none
    float order_bias;      // see favor_phrases()
    int top_k;             // 0: all tokens
    const Kernels *kernels;
    Candidate *candidates;  // (n_threads, vocab_size)
    Phrase *phrases;        // (n_phrases) what an order asks for, see set_phrases()
    size_t n_phrases, n_order;  // n_order: tokens before the story
} Sampler;

enum { PENALTY_WINDOW = 64 };  // how many tokens repeat_penalty looks back

// Uniform in [0, 1): xorshift64* (Vigna 2016, arXiv:1402.6246).
static float random_float(uint64_t *state) {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return (float)((*state * 0x2545F4914F6CDD1Du) >> 40) / 16777216.0f;
}

// The generator's initial state: splitmix64 (Steele et al. 2014) spreads neighbouring seeds.
static uint64_t random_state(uint64_t seed) {
    seed += 0x9E3779B97F4A7C15u;
    seed = (seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9u;
    seed = (seed ^ (seed >> 27)) * 0x94D049BB133111EBu;
    seed ^= seed >> 31;
    return seed ? seed : 1;  // xorshift never leaves the state 0
}

// Move the likeliest of n candidates to the front, until max_kept were moved or their sum exceeds
// `mass`. Returns how many were moved, and sets *sum to their sum; the last of them is the least
// likely. Quickselect (Hoare 1961): only the part with the boundary is split again.
static size_t keep_likeliest(Candidate *c, size_t n, size_t max_kept, float mass, float *sum) {
    size_t kept = 0;
    uint32_t state = 1;
    for (*sum = 0.0f; kept < n;) {
        state = state * 1664525u + 1013904223u;  // a random pivot avoids the worst case
        size_t place = kept + (size_t)((uint64_t)state * (n - kept) >> 32), at = kept;
        Candidate pivot = c[place];
        float before = *sum;
        c[place] = c[n - 1];
        for (size_t i = kept; i < n - 1; i++) {  // without unpredictable branches
            Candidate moved = c[i];
            bool is_first = comes_first(moved, pivot);
            c[i] = c[at];
            c[at] = moved;
            at += is_first;
            before += is_first ? moved.score : 0.0f;
        }
        c[n - 1] = c[at];
        c[at] = pivot;
        if (at < max_kept && !(before > mass)) kept = at + 1, *sum = before + pivot.score;
        else n = at;
    }
    return kept;
}

// A probability below which no token is kept, so that few tokens need sorting. With top_p, the
// tokens below it sum to less than 1 - top_p. With top_k, the tokens are split into COLUMNS groups,
// and the bound is the top_k-th largest of the groups' maxima, which at least top_k tokens reach.
static float lower_bound(const Sampler *s, const float *probs, int n, float top_p) {
    enum { COLUMNS = 1024 };
    Candidate *c = s->candidates;
    float maxima[COLUMNS] = {0}, sum;
    if (!s->top_k) return (1.0f - top_p) / (float)n;
    if (s->top_k >= COLUMNS || n <= COLUMNS) return 0.0f;
    for (int i = 0; i < n; i += COLUMNS)
        for (int j = 0; j < COLUMNS && j < n - i; j++)
            maxima[j] = probs[i + j] > maxima[j] ? probs[i + j] : maxima[j];
    for (int j = 0; j < COLUMNS; j++) c[j] = (Candidate){maxima[j], j};
    return c[keep_likeliest(c, COLUMNS, (size_t)s->top_k, INFINITY, &sum) - 1].score;
}

// Sample from the tokens at least min_p times as likely as the likeliest (Nguyen et al. 2024), then
// only the top_k likeliest, then only the likeliest whose total probability reaches top_p (Holtzman
// et al. 2020).
static int sample_likeliest(const Sampler *s, const float *probs, int n, float coin) {
    size_t likeliest = s->kernels->argmax(probs, n), left = 0;
    float top_p = s->top_p > 0.0f ? s->top_p : 1.0f, sum = 1.0f;
    float bound = lower_bound(s, probs, n, top_p), min_prob = s->min_p * probs[likeliest];
    if (bound < min_prob) bound = min_prob;
    if (!(bound > 0.0f)) bound = FLT_MIN;  // tokens of probability 0 are never sampled
    Candidate *c = s->candidates;
    for (int first = 0; first < n; first += LANES) {  // most vectors have no candidate
        int last = n - first < LANES ? n : first + LANES, any = 0;
        for (int i = first; i < last; i++) any |= probs[i] >= bound;
        for (int i = first; any && i < last; i++)
            if (probs[i] >= bound) c[left++] = (Candidate){probs[i], i};
    }
    if (!left) return (int)likeliest;  // only if the logits are NaN
    if (s->top_k) left = keep_likeliest(c, left, (size_t)s->top_k, INFINITY, &sum);
    left = keep_likeliest(c, left, left, top_p * sum, &sum);
    left = keep_likeliest(c, left, left, coin * sum, &sum);
    return c[left - 1].index;
}

// Add order_bias to the logit of each phrase's next token, until the story has the phrase.
static void favor_phrases(const Sampler *s, float *logits, const int *history, size_t n_history) {
    for (size_t i = 0; i < s->n_phrases; i++) {
        Phrase p = s->phrases[i];
        size_t k = 0;  // how much of the phrase the story ends with
        for (size_t at = s->n_order; at < n_history && k < p.n; at++)
            k = history[at] == p.tokens[k] ? k + 1 : history[at] == p.tokens[0];
        if (k < p.n) logits[p.tokens[k]] += s->order_bias;
    }
}

// Sample the next token from logits (n), which are overwritten. history: the tokens before it.
static int sample(Sampler *s, uint64_t *state, float *logits, int n, const int *history,
                  size_t n_history) {
    size_t first = n_history > PENALTY_WINDOW ? n_history - PENALTY_WINDOW : 0;
    favor_phrases(s, logits, history, n_history);
    for (size_t i = first; s->repeat_penalty != 1.0f && i < n_history; i++) {
        size_t j = first;  // Keskar et al. 2019, once per distinct token
        while (history[j] != history[i]) j++;
        float *logit = &logits[history[i]];
        if (j == i) *logit *= *logit > 0 ? 1.0f / s->repeat_penalty : s->repeat_penalty;
    }
    if (s->temperature == 0.0f) return (int)s->kernels->argmax(logits, n);
    s->kernels->softmax(logits, n, s->temperature);
    float coin = random_float(state), cumulative = 0.0f;
    if ((s->top_p > 0.0f && s->top_p < 1.0f) || s->top_k || s->min_p > 0.0f)
        return sample_likeliest(s, logits, n, coin);
    for (int i = 0; i < n; i++) {
        cumulative += logits[i];
        if (coin < cumulative) return i;
    }
    return (int)s->kernels->argmax(logits, n);  // rounding can leave the coin above the sum
}

// ------------------------------------------------------------------------------------------------
// Stories

// Flush stdout, and fail if it cannot be written, for example to a full disk.
static void flush_output(const char *what) {
    if (fflush(stdout) || ferror(stdout)) die("cannot write the %s: %s", what, strerror(errno));
}

typedef struct {
    int *tokens;  // (n_positions + 1): a BOS, the prompt, and the tokens sampled so far
    size_t n, n_printed;
    size_t n_hidden;  // tokens that are not printed: the BOS, and those of an order
    uint64_t seed, state;
    bool is_done;
} Story;

// Run as many of the first story's n tokens as fit in a batch, starting at position `first`.
// Computes the logits after every token, or only after token n - 1. Returns the number of tokens
// in the batch.
static size_t feed(Model *m, const int *tokens, size_t first, size_t n, bool wants_all) {
    BatchToken batch[MAX_BATCH];
    size_t count = n - first < m->max_batch ? n - first : m->max_batch;
    if (count > MAX_BATCH) count = MAX_BATCH;
    for (size_t i = 0, pos = first; i < count; i++, pos++)
        batch[i] = (BatchToken){tokens[pos], pos ? tokens[pos - 1] : -1, (int)pos, 0,
                                wants_all || pos + 1 == n};
    run_batch(m, batch, count);
    return count;
}

// Run tokens `start` to n - 1, with the earlier ones in the cache. Returns the last one's logits.
static float *prefill(Model *m, const int *tokens, size_t start, size_t n) {
    while (start < n) start += feed(m, tokens, start, n, false);
    return logits_of(m, 0);
}

// Copy the first n positions of the first story's cache to another story.
static void copy_first_story(Model *m, size_t story, size_t n) {
    size_t head_dim = m->config.dim / m->config.n_heads, places = ROUND_UP(m->n_positions, LANES);
    size_t heads = (size_t)m->config.n_layers * m->config.n_kv_heads, used = ROUND_UP(n, LANES);
    size_t k = head_dim * (m->bf16_cache ? 2 : 4), v = k / head_dim * ROUND_UP(head_dim, LANES);
    for (size_t i = 0; i < heads; i++) {
        memcpy(m->keys + (story * heads + i) * places * k, m->keys + i * places * k, used * k);
        memcpy(m->values + (story * heads + i) * places * v, m->values + i * places * v, used * v);
    }
}

// Sample the next token of a story. The story ends at EOS, at BOS, or after the last position.
static void draw_next(const Model *m, const Tokenizer *t, const Sampler *sampler, Story *s,
                      float *logits) {
    Sampler local = *sampler;
    local.candidates += (size_t)omp_get_thread_num() * m->config.vocab_size;
    int token = sample(&local, &s->state, logits, m->config.vocab_size, s->tokens, s->n);
    s->is_done = token == t->bos || token == t->eos;
    if (!s->is_done) s->tokens[s->n++] = token;
    if (s->n > m->n_positions) s->is_done = true;
}

// Print the tokens of a story that have not been printed yet.
static void print_story(const Tokenizer *t, Printer *printer, Story *s) {
    if (printer->is_json && !s->n_printed)
        fprintf(printer->out, "{\"seed\": %llu, \"text\": \"", (unsigned long long)s->seed);
    if (!s->n_printed) s->n_printed = s->n_hidden;
    for (; s->n_printed < s->n; s->n_printed++)
        print_token(t, printer, s->tokens[s->n_printed], s->n_printed == s->n_hidden);
    if (s->is_done) {
        print_rest(printer);
        if (printer->is_json) fprintf(printer->out, "\", \"tokens\": %zu}", s->n - 1);
        fputc('\n', printer->out);
    }
    double now = seconds();
    if (s->is_done || now - printer->flushed > 0.02) {  // more often would slow down a terminal
        flush_output("story");
        printer->flushed = now;
    }
}

// What a story must contain; NULL: nothing in particular.
typedef struct { const char *words, *features, *sentence, *summary; } Order;

// Append a line of an order to `at`: its name, and the text with single spaces between words. A list
// has commas between its parts. Returns where the next line goes.
static char *append_field(char *at, const char *name, const char *text, bool is_list) {
    if (!text) return at;
    char *start = at, *value = at + sprintf(at, "%s: ", name);
    at = value;
    bool is_gap = false, is_next = false;  // white space, a comma since the last character
    for (const char *c = text; *c; c++) {
        if (strchr(" \t\n\v\f\r", *c)) is_gap = true;
        else if (is_list && *c == ',') is_next = true;
        else {
            if (at > value && is_next) *at++ = ',';
            if (at > value && (is_gap || is_next)) *at++ = ' ';
            is_gap = is_next = false;
            *at++ = *c;
        }
    }
    if (at == value) return start;
    *at++ = '\n';
    return at;
}

// Return the prompt of an order and the beginning of a story, as text/orders.py writes it. n (out):
// the bytes before the story; 0 without an order.
static char *order_prompt(const Order *order, const char *beginning, size_t *n) {
    const char *texts[] = {order->words, order->features, order->sentence, order->summary};
    size_t room = strlen(beginning) + 80;
    for (int i = 0; i < 4; i++) room += texts[i] ? 2 * strlen(texts[i]) : 0;
    char *prompt = alloc(room, 1), *at = prompt;
    at = append_field(at, "Words", order->words, true);
    at = append_field(at, "Features", order->features, true);
    at = append_field(at, "Random sentence", order->sentence, false);
    at = append_field(at, "Summary", order->summary, false);
    bool is_ordered = at > prompt;
    if (is_ordered) at += sprintf(at, "Story:");
    *n = (size_t)(at - prompt);
    while (is_ordered && *beginning == ' ') beginning++;
    if (*beginning) sprintf(at, "%s%s", is_ordered ? " " : "", beginning);
    return prompt;
}

// Set what a sampler favors: the words of an order, its sentence, and a quotation mark for dialogue.
// prompt: that of the order, in its first n_order bytes.
static void set_phrases(Sampler *s, const Tokenizer *t, const Order *order, const char *prompt,
                        size_t n_order) {
    const char *fields[] = {order->words, order->features, order->sentence};
    size_t n_start, n_all;
    s->n_phrases = 0;
    s->phrases = alloc(n_order, sizeof *s->phrases);  // each is at least a byte of the order
    encode(t, prompt, n_order, &s->n_order);
    encode(t, "Story:", 6, &n_start);
    for (int i = 0; i < 3; i++) {
        const bool is_features = i == 1, is_list = i < 2;
        for (const char *part = fields[i], *next; part; part = next ? next + 1 : NULL) {
            next = is_list ? strchr(part, ',') : NULL;
            size_t n = next ? (size_t)(next - part) : strlen(part);
            char *text = alloc(n + 1, 1), *line = alloc(n + sizeof "Story: \n", 1);
            memcpy(text, part, n);  // encoded as in a story
            size_t size = (size_t)(append_field(line, "Story", text, false) - line);
            if (!size || (is_features && strncmp(line, "Story: Dialogue\n", size))) continue;
            if (is_features) size = (size_t)sprintf(line, "Story: \"\n");
            int *tokens = encode(t, line, size - 1, &n_all);
            s->phrases[s->n_phrases++] = (Phrase){tokens + n_start, n_all - n_start};
        }
    }
}

// Print the prompt and its continuation, for each story, but not the order in the first n_order
// bytes of the prompt. A single story is printed token by token, several at the end, one after
// another. Seed and speed go to stderr; so does a note if the context cuts a story and wants_note is
// set.
static void generate(Model *m, const Tokenizer *tokenizer, const Sampler *sampler,
                     const char *prompt, size_t n_order, uint64_t seed, bool as_json,
                     bool wants_note) {
    size_t n_prompt, n_hidden = 1, n_stories = m->n_stories, n_generated = 0;
    if (n_order) encode(tokenizer, prompt, n_order, &n_hidden);
    int *tokens = encode(tokenizer, prompt, strlen(prompt), &n_prompt);
    if (n_prompt > (size_t)m->config.seq_len)
        die("the prompt has %zu tokens, but the model's context is %d: shorten the prompt",
            n_prompt, m->config.seq_len);
    if (n_prompt > m->n_positions)
        die("the prompt has %zu tokens, but -n is %zu: raise -n, or use -n 0 for the whole context "
            "of %d", n_prompt, m->n_positions, m->config.seq_len);
    if (valid_utf8(prompt, strlen(prompt)) < strlen(prompt))
        fputs("note: the prompt is not UTF-8; its invalid bytes are read as U+FFFD\n", stderr);
    fprintf(stderr, "seed: %llu\n", (unsigned long long)seed);
    Printer printer = {.out = stdout, .is_terminal = isatty(fileno(stdout)), .is_json = as_json,
                       .has_order = n_order > 0};
    Story *stories = alloc(n_stories, sizeof(Story));
    BatchToken *batch = alloc(n_stories, sizeof(BatchToken));

    double start = seconds();
    float *logits = prefill(m, tokens, 0, n_prompt);
    double prefilled = seconds();
    for (size_t i = 0; i < n_stories; i++) {
        stories[i] = (Story){alloc(m->n_positions + 1, sizeof(int)), n_prompt, 0, n_hidden,
                             seed + i, random_state(seed + i), false};
        memcpy(stories[i].tokens, tokens, n_prompt * sizeof *tokens);
        batch[i].story = (int)i;
        if (!i) continue;
        copy_first_story(m, i, n_prompt);
        memcpy(logits_of(m, i), logits, m->config.vocab_size * sizeof *logits);
    }
    bool is_cut = false;
    for (size_t n = n_stories; n; n_generated += n) {
        OMP(parallel for num_threads(m->n_active) if (n > 1))
        for (size_t i = 0; i < n; i++)
            draw_next(m, tokenizer, sampler, &stories[batch[i].story], logits_of(m, i));
        if (n_stories == 1) print_story(tokenizer, &printer, stories);
        n = 0;
        for (size_t i = 0; i < n_stories; i++) {
            const Story *s = &stories[i];
            is_cut |= s->n > m->n_positions;
            if (!s->is_done)
                batch[n++] = (BatchToken){s->tokens[s->n - 1], s->tokens[s->n - 2], (int)s->n - 1,
                                          (int)i, true};
        }
        if (n) run_batch(m, batch, n);
    }
    double end = seconds();
    for (size_t i = 0; n_stories > 1 && i < n_stories; i++) {
        if (i && !as_json) fputs("\n---\n\n", stdout);
        print_story(tokenizer, &printer, &stories[i]);
    }
    if (is_cut && wants_note)
        fprintf(stderr, "note: %s story stops at the model's context of %d tokens\n",
                n_stories > 1 ? "a" : "the", m->config.seq_len);
    if (n_stories == 1 && stories[0].n == n_prompt && n_prompt < m->n_positions && !as_json)
        fputs("note: the model ended the story at once; try another seed (-s) or prompt (-i)\n",
              stderr);
    fprintf(stderr, "prompt: %zu tokens, %.1f tok/s\n", n_prompt,
            (double)n_prompt / (prefilled - start));
    if (n_generated)
        fprintf(stderr, "achieved tok/s: %.1f\n", (double)n_generated / (end - prefilled));
}

// ------------------------------------------------------------------------------------------------
// Evaluation: bits per byte of a text, as in train.py

// The next document of a file from *at on, or NULL. Documents are separated by <|endoftext|>; white
// space around them is dropped. The text is not NUL-terminated; *n is its length.
static const char *next_document(const File *f, size_t *at, size_t *n) {
    static const char mark[] = "<|endoftext|>";
    const size_t length = sizeof mark - 1;
    while (*at < f->size) {
        const char *start = (const char *)f->data + *at, *limit = start + (f->size - *at);
        const char *end = start;
        while (end < limit && ((size_t)(limit - end) < length || memcmp(end, mark, length))) end++;
        *at += (size_t)(end - start) + length;
        while (start < end && isspace((uint8_t)*start)) start++;
        while (end > start && isspace((uint8_t)end[-1])) end--;
        *n = (size_t)(end - start);
        if (*n) return start;
    }
    return NULL;
}

// Copy a text (n bytes) with \r\n and \r as newlines, which is how training reads it. Returns the
// number of bytes written.
static size_t copy_lines(char *out, const char *text, size_t n) {
    size_t size = 0;
    for (size_t i = 0; i < n; i++) {
        bool is_return = text[i] == '\r';
        out[size++] = is_return ? '\n' : text[i];
        i += is_return && i + 1 < n && text[i + 1] == '\n';
    }
    return size;
}

// Mean loss over tokens 1 to n - 1, in nats per token. As in train.py, the tokens are read in
// windows of the context, and each window starts with an empty cache.
static double loss_of(Model *m, const int *tokens, size_t n) {
    size_t vocab = m->config.vocab_size;
    double total = 0.0;
    for (size_t start = 0, window; start + 1 < n; start += window) {
        window = n - 1 - start < m->n_positions ? n - 1 - start : m->n_positions;
        for (size_t first = 0, count; first < window; first += count) {
            double losses[MAX_BATCH];
            count = feed(m, tokens + start, first, window, true);
            OMP(parallel for num_threads(m->n_active))
            for (size_t i = 0; i < count; i++) {
                float *logits = logits_of(m, i), target = logits[tokens[start + first + i + 1]];
                size_t best = m->kernels->argmax(logits, vocab);
                float max = logits[best];
                m->kernels->softmax(logits, vocab, 1.0f);  // the likeliest becomes 1 / sum
                losses[i] = (double)max - log(logits[best]) - (double)target;
            }
            for (size_t i = 0; i < count; i++) total += losses[i];
        }
    }
    return total / (double)(n - 1);
}

static void evaluate(Model *m, const Tokenizer *tokenizer, File f, bool as_json) {
    size_t valid = valid_utf8(f.data, f.size), at = 0;
    if (valid < f.size)
        die("%s is not UTF-8: byte %zu is 0x%02X; convert it to UTF-8, for example with iconv",
            f.path, valid, f.data[valid]);
    if (f.size >= 3 && !memcmp(f.data, "\xEF\xBB\xBF", 3)) at = 3;  // a byte order mark
    size_t length, n = 0, bytes = 0, n_documents = 0;
    int *tokens = alloc((uint64_t)f.size + EXTRA_TOKENS, sizeof(int));  // UTF-8: one per byte
    const Block *kept = blocks;
    for (const char *text; (text = next_document(&f, &at, &length)); n_documents++) {
        size_t count;
        char *lines = alloc(length, 1);
        length = copy_lines(lines, text, length);
        int *ids = encode(tokenizer, lines, length, &count);
        memcpy(tokens + n, ids, count * sizeof(int));
        release_to(kept);
        n += count;
        bytes += length;
    }
    if (n < 2) die("%s has no text to evaluate", f.path);
    double start = seconds(), loss = loss_of(m, tokens, n), elapsed = seconds() - start;
    if (!isfinite(loss)) die("the loss on %s is NaN or infinite: the model is damaged", f.path);
    const char *format = as_json ? "{\"documents\": %zu, \"bytes\": %zu, \"tokens\": %zu, "
                                   "\"loss\": %.6f, \"bits_per_byte\": %.6f}\n"
                                 : "%zu documents, %zu bytes, %zu tokens\n"
                                   "loss: %.4f nats per token\nbits per byte: %.4f\n";
    printf(format, n_documents, bytes, n, loss, loss / log(2.0) * (double)n / (double)bytes);
    flush_output("result");
    fprintf(stderr, "achieved tok/s: %.1f\n", (double)(n - 1) / elapsed);
}

// ------------------------------------------------------------------------------------------------
// Speed

static int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

enum { PREFILL, DECODE, READ, RATES = READ + PATTERNS, ROUNDS = 7, BENCH_TOKENS = 128 };

// Alternate these measurements and print medians: prefill of n_positions tokens; decode of as many,
// for all stories at once; and reading as many bytes as the matrices take, by all threads, in several
// patterns. The fastest pattern is the limit of decode.
static void bench(Model *m) {
    static const char *patterns[] = {"one stream", "one prefetched stream", "eight streams"};
    uint64_t bytes = m->matrix_bytes;
    int n = (int)m->n_positions, n_reads = 1 + (int)(200000000 / bytes);
    uint8_t *memory = alloc(bytes, 1);
    memset(memory, 1, bytes);
    int *tokens = alloc(n, sizeof(int));
    for (int i = 0; i < n; i++) tokens[i] = i % m->config.vocab_size;
    BatchToken *batch = alloc(m->n_stories, sizeof(BatchToken));
    double rates[RATES][ROUNDS + 1];
    for (int round = ROUNDS; round >= 0; round--) {  // the first loads the weights and is dropped
        double start = seconds();
        prefill(m, tokens, 0, n);
        double prefilled = seconds();
        for (int i = 0; i < n; i++) {
            for (size_t s = 0; s < m->n_stories; s++)
                batch[s] = (BatchToken){tokens[i], i ? tokens[i - 1] : -1, i, (int)s, true};
            run_batch(m, batch, m->n_stories);
        }
        double decoded = seconds();
        rates[PREFILL][round] = n / (prefilled - start);
        rates[DECODE][round] = n * (double)m->n_stories / (decoded - prefilled);
        for (int pattern = 0; pattern < PATTERNS; pattern++) {
            start = seconds();
            for (int i = 0; i < n_reads; i++) {
                OMP(parallel num_threads(m->n_threads))
                {
                    size_t share = bytes / omp_get_num_threads();  // a few bytes are left over
                    uint8_t *part = memory + share * omp_get_thread_num();
                    m->kernels->read(part, share, (Pattern)pattern);
                }
            }
            rates[READ + pattern][round] = (double)bytes * n_reads / (seconds() - start);
        }
    }
    int best = READ;
    for (int i = 0; i < RATES; i++) {
        qsort(rates[i], ROUNDS, sizeof(double), compare_doubles);
        if (i > best && rates[i][ROUNDS / 2] > rates[best][ROUNDS / 2]) best = i;
    }
    double decode = rates[DECODE][ROUNDS / 2], read = rates[best][ROUNDS / 2];
    double by_decode = decode / (double)m->n_stories * (double)bytes;
    printf("kernels: %s, %d threads, %s\n"
           "matrices: %.1f MB of a %.1f MB file\n"
           "prefill: %.1f tok/s\n"
           "decode: %.1f tok/s\n"
           "memory: %.1f GB/s as %s, %.1f GB/s by decode (%.0f %%)\n",
           m->kernels->name, m->n_threads, FORMATS[m->config.format].name, (double)bytes / 1e6,
           (double)m->file.size / 1e6, rates[PREFILL][ROUNDS / 2], decode, read / 1e9,
           patterns[best - READ], by_decode / 1e9, 100 * by_decode / read);
    flush_output("figures");
}

// ------------------------------------------------------------------------------------------------
// The command line

static void print_usage(FILE *out) {
    fputs(
        "usage: ./run model.bin [options]\n"
        "\n"
        "  -i TEXT   prompt (default: none)\n"
        "  -z FILE   tokenizer file (default: tokenizer.bin beside the model, or in this folder)\n"
        "  -n INT    total tokens, including the prompt (default 256; 0: the whole context);\n"
        "            with -m eval: tokens per window (default: the whole context)\n"
        "  -t FLOAT  temperature; 0 always picks the likeliest token (default 1.0)\n"
        "  -p FLOAT  top-p: keep the likeliest tokens up to this total probability\n"
        "            (default 0.9; 1: all)\n"
        "  -k INT    top-k: keep the k likeliest tokens (default 0: all)\n"
        "  --min-p FLOAT           drop tokens less likely than this fraction of the likeliest\n"
        "  --repeat-penalty FLOAT  make the last 64 tokens less likely (default 1: off)\n"
        "  -s INT    seed; the same seed gives the same story (default: the time)\n"
        "  --words LIST, --features LIST, --sentence TEXT, --summary TEXT\n"
        "            what the story must contain, for models trained with orders; for example\n"
        "            --words \"dragon, soup\" --features Dialogue\n"
        "  --order-bias FLOAT      added to the logits of what is ordered until the story has it\n"
        "            (default 3; 0: off)\n"
        "  -b INT    number of stories to generate at once, with seeds from -s up\n"
        "  --json    print one line of JSON per story, or for the evaluation\n"
        "  -m MODE   generate (default), or eval: bits per byte of a text file (-i FILE)\n"
        "  --bench   measure tokens/s of prefill and decode (-n INT of each, default 128),\n"
        "            and the memory bandwidth\n"
        "  -j INT    number of threads (default: automatic)\n"
        "  --fast    int8, int4: 8-bit activations instead of 16-bit ones; with AVX-512 or\n"
        "            NEON, long prompts and -b get faster\n"
        "  --kv FORMAT  format of the key/value cache: fp32 (default) or bf16\n"
        "  -h        print this help\n"
        "\n"
        "example: ./run out/model.bin -z data/tok4096.bin -t 0.8 -i \"Once upon a time\"\n",
        out);
}

static double parse_number(const char *flag, const char *text, double min, double max) {
    char *end;
    double value = strtod(text, &end);
    if (end == text || *end || !(value >= min && value <= max))
        die("%s %s: expected a number from %g to %g", flag, text, min, max);
    return value;
}

static uint64_t parse_integer(const char *flag, const char *text, uint64_t min, uint64_t max) {
    char *end;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    if (text[0] < '0' || text[0] > '9' || *end || errno || value < min || value > max)
        die("%s %s: expected a whole number from %llu to %llu", flag, text,
            (unsigned long long)min, (unsigned long long)max);
    return value;
}

// Parse a flag with two choices. Returns whether it is the second.
static bool parse_choice(const char *flag, const char *text, const char *first,
                         const char *second) {
    bool is_second = !strcmp(text, second);
    if (!is_second && strcmp(text, first))
        die("%s %s: expected %s or %s", flag, text, first, second);
    return is_second;
}

// tokenizer.bin beside the model, beside the target if the model is a link, or in the current
// folder.
static char *default_tokenizer(const char *model_path) {
    static const char name[] = "tokenizer.bin";
    char *target = realpath(model_path, NULL), *path = NULL;
    const char *places[] = {model_path, target ? target : model_path, ""};
    struct stat info;
    for (size_t i = 0; i < 3; i++) {
        const char *slash = strrchr(places[i], '/');
        size_t folder = slash ? (size_t)(slash - places[i]) + 1 : 0;
        path = alloc(folder + sizeof name, 1);
        memcpy(path, places[i], folder);
        memcpy(path + folder, name, sizeof name);
        if (!stat(path, &info)) break;
    }
    free(target);
    return path;
}

typedef struct {
    const char *model, *tokenizer;  // paths
    const char *text;               // the prompt, or with -m eval a path
    Order order;
    int n_positions, n_stories, n_threads;
    uint64_t seed;
    Sampler sampler;
    bool as_json, is_eval, is_bench, is_fast, bf16_cache, wants_help;
} Options;

static Options parse_options(int argc, char **argv) {
    Options o = {.n_positions = -1, .n_stories = 1, .seed = (uint64_t)time(NULL),
                 .sampler = {.temperature = 1.0f, .top_p = 0.9f, .repeat_penalty = 1.0f,
                             .order_bias = 3.0f}};
    const char *mode = "generate", *cache = "fp32";
    const struct {
        const char *flag;
        enum { TEXT, INTEGER, SEED, NUMBER, SWITCH } kind;
        void *place;
        double min, max;
    } flags[] = {
        {"-i", TEXT, &o.text, 0, 0},
        {"-z", TEXT, &o.tokenizer, 0, 0},
        {"-n", INTEGER, &o.n_positions, 0, INT_MAX - 1},
        {"-t", NUMBER, &o.sampler.temperature, 0, 100},
        {"-p", NUMBER, &o.sampler.top_p, 0, 1},
        {"-k", INTEGER, &o.sampler.top_k, 0, INT_MAX},
        {"--min-p", NUMBER, &o.sampler.min_p, 0, 1},
        {"--repeat-penalty", NUMBER, &o.sampler.repeat_penalty, 0.01, 100},
        {"-s", SEED, &o.seed, 0, 0},
        {"--words", TEXT, &o.order.words, 0, 0},
        {"--features", TEXT, &o.order.features, 0, 0},
        {"--sentence", TEXT, &o.order.sentence, 0, 0},
        {"--summary", TEXT, &o.order.summary, 0, 0},
        {"--order-bias", NUMBER, &o.sampler.order_bias, 0, 100},
        {"-b", INTEGER, &o.n_stories, 1, MAX_STORIES},
        {"--json", SWITCH, &o.as_json, 0, 0},
        {"-m", TEXT, &mode, 0, 0},
        {"--bench", SWITCH, &o.is_bench, 0, 0},
        {"-j", INTEGER, &o.n_threads, 1, MAX_THREADS},
        {"--fast", SWITCH, &o.is_fast, 0, 0},
        {"--kv", TEXT, &cache, 0, 0},
        {"-h", SWITCH, &o.wants_help, 0, 0},
        {"--help", SWITCH, &o.wants_help, 0, 0},
    };
    for (int i = 1; i < argc; i++) {
        const char *arg = argv[i];
        if (arg[0] != '-') {
            if (o.model) die("expected one model file, not both %s and %s", o.model, arg);
            o.model = arg;
            continue;
        }
        size_t f = 0, n_flags = sizeof flags / sizeof *flags;
        while (f < n_flags && strcmp(arg, flags[f].flag)) f++;
        if (f == n_flags) die("unknown option %s: ./run -h lists all options", arg);
        if (flags[f].kind != SWITCH && ++i == argc)
            die("%s needs a value: ./run -h lists all options", arg);
        void *place = flags[f].place;
        double min = flags[f].min, max = flags[f].max;
        switch (flags[f].kind) {
        case SWITCH: *(bool *)place = true; break;
        case INTEGER: *(int *)place = (int)parse_integer(arg, argv[i], min, max); break;
        case SEED: *(uint64_t *)place = parse_integer(arg, argv[i], 0, UINT64_MAX); break;
        case NUMBER: *(float *)place = (float)parse_number(arg, argv[i], min, max); break;
        case TEXT: *(const char **)place = argv[i]; break;
        }
    }
    o.is_eval = parse_choice("-m", mode, "generate", "eval");
    o.bf16_cache = parse_choice("--kv", cache, "fp32", "bf16");
    return o;
}

#if defined(IS_POSIX)
static void on_bus_error(int signal_number) {
    static const char text[] = "error: the model, tokenizer or text file shrank while it was being "
                               "read, or its disk failed: restore the file and run again\n";
    (void)signal_number;
    _exit(write(STDERR_FILENO, text, sizeof text - 1) < 0 ? 2 : EXIT_FAILURE);
}
#endif

int main(int argc, char **argv) {
#if defined(IS_POSIX)
    signal(SIGBUS, on_bus_error);  // raised by a mapped file that shrank
#endif
    Options o = parse_options(argc, argv);
    if (!o.model || o.wants_help) {
        print_usage(o.wants_help ? stdout : stderr);
        flush_output("help");
        return o.wants_help ? EXIT_SUCCESS : EXIT_FAILURE;
    }
    if (o.is_eval && !o.text) die("-i FILE is missing: -m eval needs a text file");
    const int n_requested = o.n_positions;  // -1 without -n
    if (o.n_positions < 0) o.n_positions = o.is_eval ? 0 : o.is_bench ? BENCH_TOKENS : 256;
    File text = {0};
    if (o.is_eval) {
        o.n_stories = 1;
        text = open_file(o.text, "pass a text file (-i)");
        size_t max_tokens = text.size + EXTRA_TOKENS;  // further positions would stay unused
        if (max_tokens < MAX_CONTEXT && (!o.n_positions || (size_t)o.n_positions > max_tokens))
            o.n_positions = (int)max_tokens;
    }
    Model model = load_model(open_file(o.model, MODEL_HINT), o.n_positions, o.n_stories,
                             o.is_eval, o.n_threads, o.bf16_cache, o.is_fast);
    if (o.is_bench) {
        bench(&model);
    } else {
        if (!o.tokenizer) o.tokenizer = default_tokenizer(o.model);
        Tokenizer tokenizer = load_tokenizer(open_file(o.tokenizer, TOKENIZER_HINT),
                                             model.config.vocab_size);
        check_tokenizer(&tokenizer, &model.config, o.model);
        o.sampler.kernels = model.kernels;
        o.sampler.candidates = alloc((uint64_t)model.n_threads * model.config.vocab_size,
                                     sizeof(Candidate));
        size_t n_order;
        const char *prompt = order_prompt(&o.order, o.text ? o.text : "", &n_order);
        if (n_order && !has(&model.config, ORDERS))
            die("%s was trained without orders: train with shards of pretokenize --orders", o.model);
        if (n_order) set_phrases(&o.sampler, &tokenizer, &o.order, prompt, n_order);
        bool wants_note = n_requested > model.config.seq_len && !o.as_json;
        if (o.is_eval) evaluate(&model, &tokenizer, text, o.as_json);
        else generate(&model, &tokenizer, &o.sampler, prompt, n_order, o.seed, o.as_json,
                      wants_note);
    }
    release_to(NULL);
    return EXIT_SUCCESS;
}
