// The functions of run.c for the tests, with another main().
#define main run_main
#include "../run.c"
#undef main

// logits BATCH MODEL ID...: fp32 logits (n ids, vocab_size) of every position, raw on stdout; BATCH
// tokens go through the model at a time.
static void write_logits(char **words, int n_words) {
    int at_once = atoi(words[0]), n = n_words - 2;
    Model m = load_model(open_file(words[1], "model file"), n, 1, 1, false, false);
    BatchToken *batch = alloc(n, sizeof(BatchToken));
    for (int i = 0; i < n; i++) {
        int id = atoi(words[i + 2]), before = i ? atoi(words[i + 1]) : -1;
        batch[i] = (BatchToken){id, before, i, 0, true};
    }
    for (int first = 0; first < n; first += at_once) {
        int count = n - first < at_once ? n - first : at_once;
        run_batch(&m, batch + first, count);
        for (int i = 0; i < count; i++)
            fwrite(logits_of(&m, i), sizeof(float), m.config.vocab_size, stdout);
    }
    release_to(NULL);
}

// encode TOKENIZER VOCAB_SIZE: texts on stdin, each followed by a NUL; a line of ids for each.
static void encode_lines(const char *path, int vocab_size) {
    Tokenizer t = load_tokenizer(open_file(path, "tokenizer file"), vocab_size);
    size_t n = 0, room = 1 << 16;
    char *text = malloc(room);
    for (int c; (c = getchar()) != EOF;) {
        if (n == room) text = realloc(text, room *= 2);
        text[n++] = (char)c;
        if (c) continue;
        size_t n_tokens;
        const Block *kept = blocks;
        int *tokens = encode(&t, text, n - 1, &n_tokens);
        for (size_t i = 0; i < n_tokens; i++) printf(i ? " %d" : "%d", tokens[i]);
        putchar('\n');
        release_to(kept);
        n = 0;
    }
    free(text);
    release_to(NULL);
}

// decode TOKENIZER VOCAB_SIZE ID...: the text of the ids.
static void decode(char **words, int n) {
    Tokenizer t = load_tokenizer(open_file(words[0], "tokenizer file"), atoi(words[1]));
    Printer printer = {.out = stdout};
    for (int i = 2; i < n; i++) print_token(&t, &printer, atoi(words[i]), i == 2);
    print_rest(&printer);
    release_to(NULL);
}

// draw TEMPERATURE TOP_P TOP_K MIN_P REPEAT_PENALTY SEED N LOGIT...: N tokens sampled from the same
// logits, after the tokens 0 and 3.
static void draw(char **words, int n_words) {
    int n = n_words - 7, told[] = {0, 3};
    Sampler s = {.temperature = strtof(words[0], NULL), .top_p = strtof(words[1], NULL),
                 .top_k = atoi(words[2]), .min_p = strtof(words[3], NULL),
                 .repeat_penalty = strtof(words[4], NULL), .kernels = pick_kernels(),
                 .candidates = alloc(n, sizeof(Candidate))};
    uint64_t state = random_state(strtoull(words[5], NULL, 10));
    float *logits = alloc(n, sizeof(float));
    for (int i = 0; i < atoi(words[6]); i++) {
        for (int j = 0; j < n; j++) logits[j] = strtof(words[7 + j], NULL);
        printf("%d\n", sample(&s, &state, logits, n, told, 2));
    }
    release_to(NULL);
}

#if defined(_OPENMP)
// threads N PASSES...: how many of N threads are in use after that many passes in which all ran (0:
// after a long pass that waited for a thread, -1: after a short one).
static void use_threads(char **words, int n_words) {
    int n = atoi(words[0]);
    Model m = {.n_threads = n, .n_active = n, .patience = MIN_PATIENCE};
    for (int i = 1; i < n_words; i++) {
        int passes = atoi(words[i]);
        if (passes == 0) adjust_threads(&m, 0.02, 0.015);
        if (passes == -1) adjust_threads(&m, 0.003, 0.0029);
        while (passes-- > 0) adjust_threads(&m, 0.001, 0.0);
        printf("%d ", m.n_active);
    }
}
#endif

int main(int argc, char **argv) {
    if (argc > 4 && !strcmp(argv[1], "logits")) write_logits(argv + 2, argc - 2);
    else if (argc == 4 && !strcmp(argv[1], "encode")) encode_lines(argv[2], atoi(argv[3]));
    else if (argc > 3 && !strcmp(argv[1], "decode")) decode(argv + 2, argc - 2);
    else if (argc > 9 && !strcmp(argv[1], "draw")) draw(argv + 2, argc - 2);
#if defined(_OPENMP)
    else if (argc > 3 && !strcmp(argv[1], "threads")) use_threads(argv + 2, argc - 2);
#endif
    else die("unknown test %s", argc > 1 ? argv[1] : "");
    return 0;
}
