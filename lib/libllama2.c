// The engine as a library, see llama2.h: run.c with these functions instead of its main().
#define main run_main
#include "../run.c"
#undef main

#include "llama2.h"

#if !defined(IS_POSIX)
#define getpid() 1
#endif

struct Llama {
    Llama *next;          // in the list of loaded models
    const char *owner;    // the thread that may use it, see `thread`; NULL: any
    atomic_bool is_busy;  // a call is running
    Model model;
    Tokenizer tokenizer;
    Sampler sampler;
    uint64_t state;   // of the random number generator
    int *tokens;      // (n_positions) the tokens that were run
    int n_tokens;     // their number
    bool has_logits;  // the last token's logits have not been sampled from
    Block *blocks;    // all memory and files, including this struct
    Block *phrases;   // the memory of sampler.phrases
};

// The loaded models. A call looks its model up here, to refuse one that was freed.
static struct {
    atomic_flag lock;
    Llama *first;
    atomic_long process;  // the process that loaded the first model, 0: none
} loaded = {.lock = ATOMIC_FLAG_INIT};

static _Thread_local char thread;  // its address identifies the thread
static _Thread_local char last_error[1000] = "";

static bool refuse(const char *reason) {
    snprintf(last_error, sizeof last_error, "%s", reason);
    return false;
}

// Lock the list of models. False in a fork, where OpenMP would wait for threads that only the
// parent has.
static bool lock_models(void) {
    long process = atomic_load(&loaded.process);
    if (process && process != (long)getpid())
        return refuse("this process was forked after a model was loaded: load models in a new "
                      "process, or fork before the first one is loaded");
    while (atomic_flag_test_and_set_explicit(&loaded.lock, memory_order_acquire))
        wait_briefly(true);
    return true;
}

static void unlock_models(void) {
    atomic_flag_clear_explicit(&loaded.lock, memory_order_release);
}

// The list's pointer to a model, or the NULL at the end of the list.
static Llama **place_of(const Llama *l) {
    Llama **place = &loaded.first;
    while (*place && *place != l) place = &(*place)->next;
    return place;
}

// Send errors to last_error and jump to `caller`.
static void catch_errors(jmp_buf *caller) {
    on_error.caller = caller;
    on_error.text = last_error;
    on_error.size = sizeof last_error;
}

// After an error: free what the failed call allocated.
static void clean_up(void) {
    release_to(NULL);
    on_error.caller = NULL;
}

// Whether a model is busy only because an error left its last call. In WebAssembly, errors leave as
// exceptions (wasm/setjmp.h), and with one thread, nothing else can be using it.
static bool was_left(void) {
#if defined(__wasm__)
    clean_up();
    return true;
#else
    return false;
#endif
}

// Start a call that reads or changes a model. False if another call is using the model, or if it
// belongs to another thread and only its owner may make this call.
static bool enter(Llama *l, bool only_owner) {
    const char *reason = NULL;
    if (!lock_models()) return false;
    if (!l || *place_of(l) != l) reason = "this model was freed or never loaded";
    else if (l->is_busy && !was_left()) reason = "another thread is using this model";
    else if (only_owner && l->owner && l->owner != &thread)
        reason = "this model belongs to another thread until that thread calls llama_hand_over()";
    else l->is_busy = true;
    if (!reason && only_owner) l->owner = &thread;
    unlock_models();
    return reason ? refuse(reason) : true;
}

static void leave(Llama *l) { l->is_busy = false; }

// End a call and return its result; -1: it failed for this reason.
static int leave_with(Llama *l, int result, const char *reason) {
    leave(l);
    if (result < 0) refuse(reason);
    return result;
}

const char *llama_error(void) { return last_error; }

// Load a model from open files. Errors jump to the caller.
static Llama *load(File model, File tokenizer, int n_positions, int n_threads) {
    if (!lock_models()) longjmp(*on_error.caller, 1);
    unlock_models();
    Llama *l = alloc(1, sizeof *l);
    l->model = load_model(model, n_positions > 0 ? n_positions : 0, 1, 1,
                          n_threads > 0 ? n_threads : 0, false, false);
    int vocab_size = l->model.config.vocab_size;
    l->tokenizer = load_tokenizer(tokenizer, vocab_size);
    check_tokenizer(&l->tokenizer, &l->model.config, model.path);
    l->sampler.kernels = l->model.kernels;
    l->sampler.candidates = alloc(vocab_size, sizeof(Candidate));
    l->tokens = alloc(l->model.n_positions, sizeof(int));
    l->state = random_state(0);
    l->blocks = blocks;
    blocks = NULL;
    on_error.caller = NULL;
    lock_models();
    atomic_store(&loaded.process, (long)getpid());
    l->next = loaded.first;
    loaded.first = l;
    unlock_models();
    return l;
}

Llama *llama_load(const char *model, const char *tokenizer, int n_positions, int n_threads,
                  char *error, size_t size) {
    jmp_buf caller;
    catch_errors(&caller);
    if (setjmp(caller)) {
        clean_up();
        if (error) snprintf(error, size, "%s", last_error);
        return NULL;
    }
    File file = open_file(model, MODEL_HINT);
    return load(file, open_file(tokenizer, TOKENIZER_HINT), n_positions, n_threads);
}

Llama *llama_load_bytes(const void *model, size_t n_model, const void *tokenizer,
                        size_t n_tokenizer, int n_positions, int n_threads) {
    jmp_buf caller;
    catch_errors(&caller);
    if (setjmp(caller)) {
        clean_up();
        return NULL;
    }
    if (!n_model || !n_tokenizer) die("the model or its tokenizer has no bytes");
    File file = {"the model", model, n_model};
    return load(file, (File){"the tokenizer", tokenizer, n_tokenizer}, n_positions, n_threads);
}

// One of five constants of a model, for any thread; -1 if the model was freed.
static int constant_of(const Llama *l, int index) {
    int result = -1;
    if (!lock_models()) return -1;
    if (!l || *place_of(l) != l) refuse("this model was freed or never loaded");
    else result = (int[]){l->model.config.vocab_size, (int)l->model.n_positions, l->tokenizer.bos,
                          l->tokenizer.eos, has(&l->model.config, ORDERS)}[index];
    unlock_models();
    return result;
}

int llama_vocab_size(const Llama *l) { return constant_of(l, 0); }

int llama_n_positions(const Llama *l) { return constant_of(l, 1); }

int llama_bos(const Llama *l) { return constant_of(l, 2); }

int llama_eos(const Llama *l) { return constant_of(l, 3); }

int llama_knows_orders(const Llama *l) { return constant_of(l, 4); }

// The tokens of an order and a beginning. Errors jump to the caller.
static int *encode_ordered(Llama *l, const LlamaOrder *order, const char *beginning,
                           size_t *n_tokens, int *n_order) {
    if (!has(&l->model.config, ORDERS)) die("the model was trained without orders");
    const Order o = {order->words, order->features, order->sentence, order->summary};
    size_t n;
    const char *text = order_prompt(&o, beginning, true, &n);
    encode(&l->tokenizer, text, n, n_tokens);
    *n_order = (int)*n_tokens;
    return encode(&l->tokenizer, text, strlen(text), n_tokens);
}

// llama_encode() if `order` is NULL, else llama_encode_order(), where `text` is the beginning.
static int encode_all(Llama *l, const LlamaOrder *order, const char *text, size_t n, int *tokens,
                      int room, int *n_order) {
    if (!enter(l, true)) return -1;
    jmp_buf caller;
    catch_errors(&caller);
    if (setjmp(caller)) {
        clean_up();
        leave(l);
        return -1;
    }
    size_t n_tokens;
    int *ids = order ? encode_ordered(l, order, text, &n_tokens, n_order)
                     : encode(&l->tokenizer, text, n, &n_tokens);
    for (size_t i = 0; i < n_tokens && i < (size_t)(room > 0 ? room : 0); i++) tokens[i] = ids[i];
    release_to(NULL);
    on_error.caller = NULL;
    return leave_with(l, n_tokens > INT_MAX ? -1 : (int)n_tokens, "the text has too many tokens");
}

int llama_encode(Llama *l, const char *text, size_t n, int *tokens, int room) {
    return encode_all(l, NULL, text, n, tokens, room, NULL);
}

int llama_encode_order(Llama *l, const LlamaOrder *order, const char *beginning, int *tokens,
                       int room, int *n_order) {
    static const LlamaOrder empty = {0};
    return encode_all(l, order ? order : &empty, beginning, 0, tokens, room, n_order);
}

int llama_bias(Llama *l, const LlamaOrder *order, float bias) {
    if (!enter(l, true)) return -1;
    if (order && !(bias >= 0 && bias <= MAX_ORDER_BIAS))
        return leave_with(l, -1, "the bias of an order is out of range: expected 0 to 10");
    jmp_buf caller;
    Sampler *s = &l->sampler, changed = *s;
    changed.n_phrases = 0;
    catch_errors(&caller);
    if (setjmp(caller)) {
        clean_up();
        leave(l);
        return -1;
    }
    if (order) {
        const Order o = {order->words, order->features, order->sentence, order->summary};
        size_t n;
        const char *text = order_prompt(&o, "", true, &n);
        set_phrases(&changed, &l->tokenizer, &o, text, n);
    }
    on_error.caller = NULL;
    Block *made = blocks;
    blocks = l->phrases;
    release_to(NULL);
    l->phrases = made;
    changed.order_bias = bias;
    *s = changed;
    return leave_with(l, 0, "");
}

int llama_decode(Llama *l, const int *tokens, int n, char *text, int room) {
    Printer printer = {.text = text, .room = room > 0 ? (size_t)room : 0};
    if (!enter(l, true)) return -1;
    for (int i = 0; i < n; i++) {
        if (tokens[i] < 0 || tokens[i] >= l->model.config.vocab_size)
            return leave_with(l, -1, "a token is not in the vocabulary");
        print_token(&l->tokenizer, &printer, tokens[i], i == 1 && tokens[0] == l->tokenizer.bos);
    }
    print_rest(&printer);
    return leave_with(l, printer.n_text > INT_MAX ? -1 : (int)printer.n_text,
                      "the text is too long: its length does not fit an int");
}

const float *llama_forward(Llama *l, const int *tokens, int n, int pos) {
    if (!enter(l, true)) return NULL;
    Model *m = &l->model;
    bool fits = n > 0 && pos >= 0 && pos <= l->n_tokens &&
                (size_t)n <= m->n_positions - (size_t)pos;
    for (int i = 0; fits && i < n; i++) fits = tokens[i] >= 0 && tokens[i] < m->config.vocab_size;
    const float *logits = NULL;
    if (fits) {
        memcpy(l->tokens + pos, tokens, (size_t)n * sizeof *tokens);
        l->n_tokens = pos + n;
        l->has_logits = true;
        logits = prefill(m, l->tokens, (size_t)pos, (size_t)l->n_tokens);
    }
    leave_with(l, fits ? 0 : -1, "a token is not in the vocabulary, or a position leaves a gap or "
                                 "is beyond n_positions");
    return logits;
}

int llama_seed(Llama *l, uint64_t seed) {
    if (!enter(l, true)) return -1;
    l->state = random_state(seed);
    return leave_with(l, 0, "");
}

int llama_sample(Llama *l, const LlamaSampling *sampling) {
    if (!enter(l, true)) return -1;
    if (!l->has_logits) return leave_with(l, -1, "no logits to sample from: call llama_forward()");
    if (!(sampling->temperature >= 0 && sampling->temperature <= 100 && sampling->top_p >= 0 &&
          sampling->top_p <= 1 && sampling->min_p >= 0 && sampling->min_p <= 1))
        return leave_with(l, -1, "a setting of the sampling is out of range: expected a temperature "
                                 "from 0 to 100, top_p and min_p from 0 to 1");
    l->has_logits = false;  // sampling overwrites them
    l->sampler.temperature = sampling->temperature;
    l->sampler.top_p = sampling->top_p;
    l->sampler.min_p = sampling->min_p;
    l->sampler.top_k = sampling->top_k > 0 ? sampling->top_k : 0;
    l->sampler.repeat_penalty = sampling->repeat_penalty > 0 ? sampling->repeat_penalty : 1.0f;
    int token = sample(&l->sampler, &l->state, logits_of(&l->model, 0), l->model.config.vocab_size,
                       l->tokens, (size_t)l->n_tokens);
    return leave_with(l, token, "");
}

int llama_hand_over(Llama *l) {
    if (!enter(l, true)) return -1;
    l->owner = NULL;
    return leave_with(l, 0, "");
}

int llama_free(Llama *l) {
    if (!l) return 0;
    if (!enter(l, false)) return -1;
    lock_models();
    *place_of(l) = l->next;
    unlock_models();
    blocks = l->phrases;
    release_to(NULL);
    blocks = l->blocks;
    release_to(NULL);
    return 0;
}
