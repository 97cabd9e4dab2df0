// Opens run.c to the tests: its functions with another main.
#define main run_main
#include "../run.c"
#undef main

// logits MODEL ID...: fp32 logits (n ids, vocab_size) of every position, raw on stdout.
static void write_logits(char **words, int n) {
    Model m = load_model(words[0], n - 1);
    for (int pos = 0; pos + 1 < n; pos++) {
        float *logits = forward(&m, atoi(words[pos + 1]), pos, true);
        fwrite(logits, sizeof(float), m.config.vocab_size, stdout);
    }
    free_model(&m);
}

// encode TOKENIZER VOCAB_SIZE: texts on stdin, each with a NUL behind it; a line of ids for each.
static void encode_lines(const char *path, int vocab_size) {
    Tokenizer t = load_tokenizer(path, vocab_size);
    size_t n = 0, room = 1 << 16;
    char *text = malloc(room);
    for (int c; (c = getchar()) != EOF;) {
        if (n == room) text = realloc(text, room *= 2);
        text[n++] = (char)c;
        if (c) continue;
        size_t n_tokens;
        int *tokens = encode(&t, text, &n_tokens);
        for (size_t i = 0; i < n_tokens; i++) printf(i ? " %d" : "%d", tokens[i]);
        putchar('\n');
        free(tokens);
        n = 0;
    }
    free(text);
    free_tokenizer(&t);
}

// decode TOKENIZER VOCAB_SIZE ID...: the text of the ids.
static void decode(char **words, int n) {
    Tokenizer t = load_tokenizer(words[0], atoi(words[1]));
    Printer printer = {.out = stdout};
    for (int i = 2; i < n; i++) print_token(&t, &printer, atoi(words[i]), i == 2);
    print_rest(&printer);
    free_tokenizer(&t);
}

// draw TEMPERATURE TOP_P SEED N LOGIT...: N tokens drawn from the same logits.
static void draw(char **words, int n) {
    int n_logits = n - 4;
    Sampler s = {.temperature = strtof(words[0], NULL), .top_p = strtof(words[1], NULL)};
    set_seed(&s, strtoull(words[2], NULL, 10));
    s.candidates = alloc(n_logits, sizeof(Candidate));
    float *logits = alloc(n_logits, sizeof(float));
    for (int i = 0; i < atoi(words[3]); i++) {
        for (int j = 0; j < n_logits; j++) logits[j] = strtof(words[4 + j], NULL);
        printf("%d\n", sample(&s, logits, n_logits));
    }
    free(s.candidates);
    free(logits);
}

int main(int argc, char **argv) {
    if (argc > 3 && !strcmp(argv[1], "logits")) write_logits(argv + 2, argc - 2);
    else if (argc == 4 && !strcmp(argv[1], "encode")) encode_lines(argv[2], atoi(argv[3]));
    else if (argc > 3 && !strcmp(argv[1], "decode")) decode(argv + 2, argc - 2);
    else if (argc > 6 && !strcmp(argv[1], "draw")) draw(argv + 2, argc - 2);
    else die("unknown test %s", argc > 1 ? argv[1] : "");
    return 0;
}
