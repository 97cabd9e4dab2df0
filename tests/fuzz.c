// A libFuzzer target for run.c. Its input is a model file (TARGET 0), a tokenizer file (1), a text
// (2) for the tokenizers in the files FUZZ_TOKENIZER, FUZZ_GPT2 and FUZZ_GPT4, all of
// FUZZ_VOCAB_SIZE tokens, or a table of guesses (3) for FUZZ_TOKENIZER. tests/fuzz.py builds and
// runs it.
#define main run_main
#include "../run.c"
#undef main

enum { STEPS = 3 };

static void run_model(File file) {
    Model m = load_model(file, STEPS, 1, 1, 1, file.size % 2, file.size % 3 == 0);
    int tokens[STEPS] = {1, 0, m.config.vocab_size - 1};
    float *logits = prefill(&m, tokens, 0, m.n_positions);
    Sampler sampler = {.temperature = 0.5f, .top_p = 0.9f, .min_p = 0.01f, .top_k = 40,
                       .repeat_penalty = 1.1f, .kernels = m.kernels,
                       .candidates = alloc(m.config.vocab_size, sizeof(Candidate))};
    uint64_t state = random_state(file.size);
    int token = sample(&sampler, &state, logits, m.config.vocab_size, tokens, m.n_positions);
    if (token < 0 || token >= m.config.vocab_size) abort();
}

static void encode_and_decode(const Tokenizer *t, const char *text, size_t n) {
    size_t n_tokens;
    int *tokens = encode(t, text, n, &n_tokens);
    char out[256];
    Printer printer = {.text = out, .room = sizeof out};
    for (size_t i = 0; i < n_tokens; i++) {
        if (tokens[i] < 0 || tokens[i] >= t->vocab_size) abort();
        print_token(t, &printer, tokens[i], i == 1);
    }
    print_rest(&printer);

    char *wish = alloc(n + 1, 1);
    memcpy(wish, text, n);
    Order order = {.words = wish, .features = "Dialogue", .sentence = wish};
    size_t n_order;
    const char *prompt = order_prompt(&order, "", true, &n_order);
    Sampler sampler = {0};
    set_phrases(&sampler, t, &order, prompt, n_order);
    for (size_t i = 0; i < sampler.n_phrases; i++)
        for (size_t k = 0; k < sampler.phrases[i].n; k++)
            if (sampler.phrases[i].tokens[k] < 0 ||
                sampler.phrases[i].tokens[k] >= t->vocab_size) abort();
}

static void guess_tokens(const Draft *d, const Tokenizer *t) {
    int tokens[20 + MAX_GUESSES];
    for (int i = 0; i < 20; i++) tokens[i] = i * 7919 % t->vocab_size;
    for (size_t n = 1; n <= 20; n++) {
        size_t count = guess(d, tokens, n, MAX_GUESSES);
        for (size_t i = 0; i < count; i++)
            if (tokens[n + i] < 0 || tokens[n + i] >= t->vocab_size) abort();
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    jmp_buf caller;
    char error[500];
    on_error.caller = &caller;
    on_error.text = error;
    on_error.size = sizeof error;
    if (!size) return 0;
    if (setjmp(caller)) {
        release_to(NULL);
        return 0;
    }
    File file = {.path = "fuzz", .data = data, .size = size};
#if TARGET == 0
    run_model(file);
#elif TARGET == 1
    // the first byte gives the number of pieces, 3 + 3 * byte; the last 16 bytes are the text
    size_t text = size - 1 < 16 ? size - 1 : 16;
    file.data++;
    file.size -= 1 + text;
    if (file.size) {
        Tokenizer t = load_tokenizer(file, 3 + 3 * data[0]);
        if (!fingerprint(&t)) abort();
        encode_and_decode(&t, (const char *)data + size - text, text);
    }
#elif TARGET == 3
    File tokenizer = open_file(getenv("FUZZ_TOKENIZER"), TOKENIZER_HINT);
    Tokenizer t = load_tokenizer(tokenizer, atoi(getenv("FUZZ_VOCAB_SIZE")));
    Draft draft = load_draft(file, &t, size);
    guess_tokens(&draft, &t);
#else
    const char *paths[] = {getenv("FUZZ_TOKENIZER"), getenv("FUZZ_GPT2"),
                           getenv("FUZZ_GPT4")};
    for (int i = 0; i < 3; i++) {
        File tokenizer = open_file(paths[i], TOKENIZER_HINT);
        Tokenizer t = load_tokenizer(tokenizer, atoi(getenv("FUZZ_VOCAB_SIZE")));
        encode_and_decode(&t, (const char *)data, size);
    }
#endif
    release_to(NULL);
    return 0;
}
