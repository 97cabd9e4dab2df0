// The engine as a library: make libllama2. Every function may be called from any thread, but on one
// Llama from one at a time. examples/llama2.py uses it from Python.
#ifndef LLAMA2_H
#define LLAMA2_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define LLAMA2_API __declspec(dllexport)
#else
#define LLAMA2_API __attribute__((visibility("default")))
#endif

typedef struct Llama Llama;

typedef struct {
    float temperature;     // 0: the likeliest token
    float top_p, min_p;    // 1 and 0: all tokens
    float repeat_penalty;  // 1: none
    int top_k;             // 0: all tokens
} LlamaSampling;

// A model.bin and its tokenizer, with room for n_positions (0: the whole context), computed by
// n_threads (0: as many as pay). NULL on failure; then `error`, of `size` bytes, says why.
LLAMA2_API Llama *llama_load(const char *model, const char *tokenizer, int n_positions, int n_threads,
                  char *error, size_t size);

LLAMA2_API int llama_vocab_size(const Llama *llama);
LLAMA2_API int llama_n_positions(const Llama *llama);

// The tokens that begin and end a text; they may be the same one.
LLAMA2_API int llama_bos(const Llama *llama);
LLAMA2_API int llama_eos(const Llama *llama);

// The tokens of a text (n bytes of UTF-8), behind a BOS. Returns how many there are, and writes as
// many of them as there is room for. -1: out of memory, or more than 700 MB of text.
LLAMA2_API int llama_encode(Llama *llama, const char *text, size_t n, int *tokens, int room);

// The text of n tokens, from a BOS on or from within. Returns its bytes, and writes as many of them
// as there is room for, without a NUL. -1: one is no token, or the bytes do not fit an int.
LLAMA2_API int llama_decode(Llama *llama, const int *tokens, int n, char *text, int room);

// Run n tokens at the positions from pos on, behind those that were run before. Returns the logits
// (vocab_size) of the token behind the last, which stay until the next call. NULL: a token or a
// position that there is not.
LLAMA2_API const float *llama_forward(Llama *llama, const int *tokens, int n, int pos);

// Start the random numbers of llama_sample() anew; a new Llama has seed 0.
LLAMA2_API void llama_seed(Llama *llama, uint64_t seed);

// Draw the token behind those of the latest llama_forward(), from its logits, which that uses up.
// llama_bos() and llama_eos() end a story. -1: there was no llama_forward() since the latest token.
LLAMA2_API int llama_sample(Llama *llama, const LlamaSampling *sampling);

LLAMA2_API void llama_free(Llama *llama);

#ifdef __cplusplus
}
#endif
#endif
