// The engine as a library: make libllama2. examples/llama2.py uses it from Python.
//
// Threads: a Llama belongs to the first thread that calls llama_encode(), llama_decode(),
// llama_forward(), llama_seed() or llama_sample() with it. Until that thread calls
// llama_hand_over(), these calls fail in all other threads. Different threads may use different
// Llamas at the same time.
//
// Forks: in a child of a process that had loaded a model, every call fails. Load models there only
// if the parent had loaded none.
//
// A call also fails if the Llama was freed. A failed call changes nothing; it returns -1 or NULL,
// and llama_error() has the reason.
//
// The files are copied into memory and may change later.
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

// Load a model.bin and its tokenizer, with room for n_positions (0: the whole context), computed by
// n_threads (0: as many as help). Returns NULL on failure, with the reason in `error` (size bytes).
LLAMA2_API Llama *llama_load(const char *model, const char *tokenizer, int n_positions,
                             int n_threads, char *error, size_t size);

// Why the last failed call in this thread failed: one sentence.
LLAMA2_API const char *llama_error(void);

// These four may be called from any thread.
LLAMA2_API int llama_vocab_size(const Llama *llama);
LLAMA2_API int llama_n_positions(const Llama *llama);

// The tokens that begin and end a text; they may be the same one.
LLAMA2_API int llama_bos(const Llama *llama);
LLAMA2_API int llama_eos(const Llama *llama);

// The tokens of a text (n bytes of UTF-8; invalid bytes are read as U+FFFD), after a BOS. Returns
// their number, and writes as many as fit in `room`. -1: out of memory, or a text above 700 MB.
LLAMA2_API int llama_encode(Llama *llama, const char *text, size_t n, int *tokens, int room);

// The text of n tokens, which may start with a BOS. Returns the number of its bytes, and writes as
// many as fit in `room`, without a NUL. -1: an invalid token, or the number does not fit an int.
LLAMA2_API int llama_decode(Llama *llama, const int *tokens, int n, char *text, int room);

// Run n tokens at the positions from pos on, after those run before. Returns the logits
// (vocab_size) for the next token, which are valid until the next call. NULL: an invalid token or
// position.
LLAMA2_API const float *llama_forward(Llama *llama, const int *tokens, int n, int pos);

// Restart the random numbers of llama_sample(); a new Llama has seed 0.
LLAMA2_API int llama_seed(Llama *llama, uint64_t seed);

// Sample the next token from the logits of the last llama_forward(), which can be used only once.
// llama_bos() and llama_eos() end a story. -1: no llama_forward() since the last token.
LLAMA2_API int llama_sample(Llama *llama, const LlamaSampling *sampling);

// Let another thread use this Llama. It goes on where this thread stopped.
LLAMA2_API int llama_hand_over(Llama *llama);

// Any thread may free a Llama that no call uses. The address may then be that of another Llama.
LLAMA2_API int llama_free(Llama *llama);

#ifdef __cplusplus
}
#endif
#endif
