// The engine as a library, see llama2.h: run.c with these functions instead of its main().
#define main run_main
#include "../run.c"
#undef main

#include "llama2.h"

struct Llama {
    Model model;
    Tokenizer tokenizer;
    Sampler sampler;
    uint64_t state;   // of the random numbers
    int *tokens;      // (n_positions) that were run
    int n_tokens;     // how many of them
    bool has_logits;  // after the last token, not yet sampled from
    Block *blocks;    // all memory and files, including this struct
};

Llama *llama_load(const char *model, const char *tokenizer, int n_positions, int n_threads,
                  char *error, size_t size) {
    jmp_buf caller;
    on_error.caller = &caller;
    on_error.text = error;
    on_error.size = size;
    if (setjmp(caller)) {
        release_to(NULL);
        on_error.caller = NULL;
        return NULL;
    }
    Llama *l = alloc(1, sizeof *l);
    l->model = load_model(open_file(model, "model file"), n_positions > 0 ? n_positions : 0, 1,
                          n_threads > 0 ? n_threads : 0, false, false);
    int vocab_size = l->model.config.vocab_size;
    l->tokenizer = load_tokenizer(open_file(tokenizer, "tokenizer file"), vocab_size);
    l->sampler.kernels = l->model.kernels;
    l->sampler.candidates = alloc(vocab_size, sizeof(Candidate));
    l->tokens = alloc(l->model.n_positions, sizeof(int));
    llama_seed(l, 0);
    l->blocks = blocks;
    blocks = NULL;
    on_error.caller = NULL;
    return l;
}

int llama_vocab_size(const Llama *l) { return l->model.config.vocab_size; }

int llama_n_positions(const Llama *l) { return (int)l->model.n_positions; }

int llama_bos(const Llama *l) { return l->tokenizer.bos; }

int llama_eos(const Llama *l) { return l->tokenizer.eos; }

int llama_encode(Llama *l, const char *text, size_t n, int *tokens, int room) {
    jmp_buf caller;
    on_error.caller = &caller;
    on_error.size = 0;  // the message is not wanted
    if (setjmp(caller)) {
        release_to(NULL);
        on_error.caller = NULL;
        return -1;
    }
    size_t n_tokens;
    int *found = encode(&l->tokenizer, text, n, &n_tokens);
    for (size_t i = 0; i < n_tokens && i < (size_t)(room > 0 ? room : 0); i++) tokens[i] = found[i];
    release_to(NULL);
    on_error.caller = NULL;
    return n_tokens > INT_MAX ? -1 : (int)n_tokens;
}

int llama_decode(Llama *l, const int *tokens, int n, char *text, int room) {
    Printer printer = {.text = text, .room = room > 0 ? (size_t)room : 0};
    for (int i = 0; i < n; i++) {
        if (tokens[i] < 0 || tokens[i] >= l->model.config.vocab_size) return -1;
        print_token(&l->tokenizer, &printer, tokens[i], i == 1 && tokens[0] == l->tokenizer.bos);
    }
    print_rest(&printer);
    return printer.n_text > INT_MAX ? -1 : (int)printer.n_text;
}

const float *llama_forward(Llama *l, const int *tokens, int n, int pos) {
    Model *m = &l->model;
    if (n < 1 || pos < 0 || pos > l->n_tokens) return NULL;
    if ((size_t)n > m->n_positions - (size_t)pos) return NULL;
    for (int i = 0; i < n; i++)
        if (tokens[i] < 0 || tokens[i] >= m->config.vocab_size) return NULL;
    memcpy(l->tokens + pos, tokens, (size_t)n * sizeof *tokens);
    l->n_tokens = pos + n;
    l->has_logits = true;
    return prefill(m, l->tokens, (size_t)pos, (size_t)l->n_tokens);
}

void llama_seed(Llama *l, uint64_t seed) { l->state = random_state(seed); }

int llama_sample(Llama *l, const LlamaSampling *given) {
    if (!l->has_logits) return -1;
    l->has_logits = false;  // sampling overwrites them
    l->sampler.temperature = given->temperature;
    l->sampler.top_p = given->top_p;
    l->sampler.min_p = given->min_p;
    l->sampler.top_k = given->top_k > 0 ? given->top_k : 0;
    l->sampler.repeat_penalty = given->repeat_penalty > 0 ? given->repeat_penalty : 1.0f;
    return sample(&l->sampler, &l->state, logits_of(&l->model, 0), l->model.config.vocab_size,
                  l->tokens, (size_t)l->n_tokens);
}

void llama_free(Llama *l) {
    if (!l) return;
    blocks = l->blocks;
    release_to(NULL);
}
