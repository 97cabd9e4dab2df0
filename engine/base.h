// What every part of the engine uses: libc, errors, memory and files.

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
#if defined(__clang__)  // Unroll the next loop, so that its arrays of vectors stay in registers
#define UNROLL DO_PRAGMA(clang loop unroll(full))
#else
#define UNROLL
#endif
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
#elif defined(__aarch64__)
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
