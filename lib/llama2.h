// The engine as a library, built by make libllama2. examples/llama2.py uses it from Python.
//
// Threads: a Llama belongs to the first thread that encodes, decodes, runs, seeds, samples or sets a
// bias with it. Until that thread calls llama_hand_over(), these calls fail in all other threads.
// Different threads may use different Llamas at the same time.
//
// Forks: if a process forks after loading a model, every call fails in the child.
//
// A call also fails if the Llama was freed. A failed call changes nothing and returns -1 or NULL;
// llama_error() returns the reason.
//
// The files are copied into memory and may change afterwards.
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

// What a story must contain, for models trained with orders (doc/data.md). NULL: not ordered.
typedef struct {
    const char *words;     // with commas between them
    const char *features;  // the same; Dialogue: somebody speaks
    const char *sentence;
    const char *summary;
} LlamaOrder;

// Load a model.bin and its tokenizer, with room for n_positions (0: the whole context), to run on
// n_threads (0: automatic). Returns NULL on failure, with the reason in `error` (size bytes).
LLAMA2_API Llama *llama_load(const char *model, const char *tokenizer, int n_positions,
                             int n_threads, char *error, size_t size);

// The same from memory, where the bytes must stay unchanged until llama_free(). They should be
// aligned to 64 bytes, and must be to 4. Returns NULL on failure; llama_error() has the reason.
LLAMA2_API Llama *llama_load_bytes(const void *model, size_t n_model, const void *tokenizer,
                                   size_t n_tokenizer, int n_positions, int n_threads);

// The reason why the last failed call in this thread failed, in one sentence.
LLAMA2_API const char *llama_error(void);

// The next five may be called from any thread.
LLAMA2_API int llama_vocab_size(const Llama *llama);
LLAMA2_API int llama_n_positions(const Llama *llama);

// The tokens that start and end a text; they may be the same.
LLAMA2_API int llama_bos(const Llama *llama);
LLAMA2_API int llama_eos(const Llama *llama);

// 1 if the model was trained with orders, else 0.
LLAMA2_API int llama_knows_orders(const Llama *llama);

// Encode a text (n bytes of UTF-8; invalid bytes are read as U+FFFD) as a BOS and its tokens.
// Returns their number, and writes as many as fit in `room`. -1: out of memory, or a text above
// 700 MB, or 2 GB if it is UTF-8.
LLAMA2_API int llama_encode(Llama *llama, const char *text, size_t n, int *tokens, int room);

// Encode an order and the beginning of its story, both as UTF-8 with a NUL, as llama_encode() does.
// The first *n_order tokens are the order's; the others are the story's, and the space in front of
// their text separates the two. Without any field, it is the order of any story, which a model that
// knows orders needs in front of an empty prompt. -1: the model does not know orders.
LLAMA2_API int llama_encode_order(Llama *llama, const LlamaOrder *order, const char *beginning,
                                  int *tokens, int room, int *n_order);

// Let llama_sample() favor what an order asks for until the story has it: words, a sentence, and for
// Dialogue, after 100 tokens, a quotation mark. `bias`, from 0 to 10, is added to the logit of the
// next token of each; 3 is a good value. The tokens must start with the same order. NULL: favor
// nothing, as at the start.
LLAMA2_API int llama_bias(Llama *llama, const LlamaOrder *order, float bias);

// Decode n tokens, which may start with a BOS. Returns the text's length in bytes, and writes as
// many as fit in `room`, without a NUL. -1: an invalid token, or the length does not fit an int.
LLAMA2_API int llama_decode(Llama *llama, const int *tokens, int n, char *text, int room);

// Run n tokens at the positions from pos on; earlier positions must have been run. Returns the
// logits (vocab_size) for the next token, which are valid until the next call. NULL: an invalid
// token or position.
LLAMA2_API const float *llama_forward(Llama *llama, const int *tokens, int n, int pos);

// Seed the random numbers of llama_sample(); a new Llama has seed 0.
LLAMA2_API int llama_seed(Llama *llama, uint64_t seed);

// Sample the next token from the logits of the last llama_forward(), which can be used only once.
// llama_bos() and llama_eos() end a story. -1: no llama_forward() since the last token.
LLAMA2_API int llama_sample(Llama *llama, const LlamaSampling *sampling);

// Let another thread use this Llama. It continues where this thread stopped.
LLAMA2_API int llama_hand_over(Llama *llama);

// Free a Llama, from any thread, while no call is using it. A later Llama may get its address.
LLAMA2_API int llama_free(Llama *llama);

#ifdef __cplusplus
}
#endif
#endif
