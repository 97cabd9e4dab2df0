// The functions of run.c for the tests, with another main().
#define main run_main
#include "../run.c"
#undef main

// logits BATCH MODEL ID...: write the fp32 logits (n ids, vocab_size) of every position to stdout,
// raw; BATCH tokens go through the model at a time.
static void write_logits(char **args, int n_args) {
    int batch_size = atoi(args[0]), n = n_args - 2;
    Model m = load_model(open_file(args[1], MODEL_HINT), n, 1, 0, 1, false, false);
    BatchToken *batch = alloc(n, sizeof(BatchToken));
    for (int i = 0; i < n; i++) batch[i] = (BatchToken){atoi(args[i + 2]), i, 0, true};
    for (int first = 0; first < n; first += batch_size) {
        int count = n - first < batch_size ? n - first : batch_size;
        run_batch(&m, batch + first, count);
        for (int i = 0; i < count; i++)
            fwrite(logits_of(&m, i), sizeof(float), m.config.vocab_size, stdout);
    }
    release_to(NULL);
}

// encode TOKENIZER VOCAB_SIZE: print a line of ids for each text on stdin; a NUL ends each text.
static void encode_lines(const char *path, int vocab_size) {
    Tokenizer t = load_tokenizer(open_file(path, TOKENIZER_HINT), vocab_size);
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

// decode TOKENIZER VOCAB_SIZE ID...: print the text of the ids.
static void decode(char **args, int n) {
    Tokenizer t = load_tokenizer(open_file(args[0], TOKENIZER_HINT), atoi(args[1]));
    Printer printer = {.out = stdout};
    for (int i = 2; i < n; i++) print_token(&t, &printer, atoi(args[i]), i == 2);
    print_rest(&printer);
    release_to(NULL);
}

// draw TEMPERATURE TOP_P TOP_K MIN_P REPEAT_PENALTY SEED N LOGIT...: sample N tokens from the same
// logits, after the tokens 0 and 3.
static void draw(char **args, int n_args) {
    int n = n_args - 7, history[] = {0, 3};
    Sampler s = {.temperature = strtof(args[0], NULL), .top_p = strtof(args[1], NULL),
                 .top_k = atoi(args[2]), .min_p = strtof(args[3], NULL),
                 .repeat_penalty = strtof(args[4], NULL), .kernels = pick_kernels(),
                 .candidates = alloc(n, sizeof(Candidate))};
    uint64_t state = random_state(strtoull(args[5], NULL, 10));
    float *logits = alloc(n, sizeof(float));
    for (int i = 0; i < atoi(args[6]); i++) {
        for (int j = 0; j < n; j++) logits[j] = strtof(args[7 + j], NULL);
        printf("%d\n", sample(&s, &state, logits, n, history, 2));
    }
    release_to(NULL);
}

#if defined(_OPENMP)
// threads N PASSES...: print how many of N threads are in use after each group of PASSES passes
// without waiting (0: after a long pass that waited for a thread, -1: after a short one).
static void use_threads(char **args, int n_args) {
    int n = atoi(args[0]);
    Model m = {.n_threads = n, .n_active = n, .patience = MIN_PATIENCE};
    for (int i = 1; i < n_args; i++) {
        int passes = atoi(args[i]);
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
