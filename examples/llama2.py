"""
Generate a story from model.bin with the C engine as a shared library, through ctypes alone.

    make libllama2
    python examples/llama2.py out/model.bin "Once upon a time"
"""

import ctypes
import os
import sys

FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Sampling(ctypes.Structure):
    """LlamaSampling of lib/llama2.h."""

    _fields_ = [
        ("temperature", ctypes.c_float),
        ("top_p", ctypes.c_float),
        ("min_p", ctypes.c_float),
        ("repeat_penalty", ctypes.c_float),
        ("top_k", ctypes.c_int),
    ]


class Order(ctypes.Structure):
    """LlamaOrder of lib/llama2.h, in UTF-8."""

    _fields_ = [(name, ctypes.c_char_p) for name in ("words", "features", "sentence", "summary")]


# arguments of each function after its Llama
INTS = ctypes.POINTER(ctypes.c_int)
ARGUMENTS = {
    "vocab_size": [],
    "n_positions": [],
    "bos": [],
    "eos": [],
    "knows_orders": [],
    "encode": [ctypes.c_char_p, ctypes.c_size_t, INTS, ctypes.c_int],
    "encode_order": [ctypes.POINTER(Order), ctypes.c_char_p, INTS, ctypes.c_int, INTS],
    "bias": [ctypes.POINTER(Order), ctypes.c_float],
    "decode": [INTS, ctypes.c_int, ctypes.c_char_p, ctypes.c_int],
    "forward": [INTS, ctypes.c_int, ctypes.c_int],
    "seed": [ctypes.c_uint64],
    "sample": [ctypes.POINTER(Sampling)],
    "hand_over": [],
    "free": [],
}


def order_of(texts):
    """Return an Order. texts: a dict with some of its fields; lists are joined by commas."""
    known = [name for name, _ in Order._fields_]
    for name in texts:
        if name not in known:
            raise ValueError(f"an order has no {name!r}: expected {', '.join(known)}")
    lists = {k: v if isinstance(v, str) else ", ".join(v) for k, v in texts.items() if v}
    return Order(**{name: text.encode(errors="surrogateescape") for name, text in lists.items()})


class Llama:
    """A model with its tokenizer; lib/llama2.h documents each call."""

    def __init__(self, model, tokenizer=None, n_positions=0, n_threads=0, library=None):
        """Load the files. Raises ValueError with the engine's message if that fails."""
        tokenizer = tokenizer or os.path.join(os.path.dirname(model), "tokenizer.bin")
        library = library or os.path.join(FOLDER, "libllama2.so")
        if not os.path.exists(library):
            raise ValueError(f"{library} does not exist; run: make libllama2")
        self.c = c = ctypes.CDLL(library)
        c.llama_load.restype = ctypes.c_void_p
        c.llama_error.restype = ctypes.c_char_p
        c.llama_forward.restype = ctypes.POINTER(ctypes.c_float)
        c.llama_load.argtypes = [ctypes.c_char_p] * 2 + [ctypes.c_int] * 2
        c.llama_load.argtypes += [ctypes.c_char_p, ctypes.c_size_t]
        for name, types in ARGUMENTS.items():
            getattr(c, f"llama_{name}").argtypes = [ctypes.c_void_p, *types]
        error = ctypes.create_string_buffer(1000)
        paths = os.fsencode(model), os.fsencode(tokenizer)
        self.llama = c.llama_load(*paths, n_positions, n_threads, error, len(error))
        if not self.llama:
            raise ValueError(error.value.decode())
        self.vocab_size = c.llama_vocab_size(self.llama)
        self.n_positions = c.llama_n_positions(self.llama)
        self.stop = c.llama_bos(self.llama), c.llama_eos(self.llama)  # tokens that end a text

    def checked(self, result):
        """Return a result of the library. Raises ValueError with its message if the call failed."""
        if (result < 0) if isinstance(result, int) else not result:
            raise ValueError(self.c.llama_error().decode())
        return result

    def encode(self, text):
        """Return the tokens of a str, after a BOS."""
        data = text.encode(errors="surrogateescape")  # keeps the bytes of the command line
        n = self.checked(self.c.llama_encode(self.llama, data, len(data), None, 0))
        tokens = (ctypes.c_int * n)()
        self.c.llama_encode(self.llama, data, len(data), tokens, n)
        return list(tokens)

    def encode_order(self, order, beginning=""):
        """
        Return the tokens of an order, a dict with the fields of Order, and of how its story
        begins; and how many are the order's.
        """
        args = ctypes.byref(order_of(order)), beginning.encode()
        n_order = ctypes.c_int()
        n = self.c.llama_encode_order(self.llama, *args, None, 0, ctypes.byref(n_order))
        tokens = (ctypes.c_int * self.checked(n))()
        self.c.llama_encode_order(self.llama, *args, tokens, n, ctypes.byref(n_order))
        return list(tokens), n_order.value

    def decode(self, tokens):
        """Return the text of a list of tokens."""
        tokens = (ctypes.c_int * len(tokens))(*tokens)
        n = self.checked(self.c.llama_decode(self.llama, tokens, len(tokens), None, 0))
        text = ctypes.create_string_buffer(n)
        self.c.llama_decode(self.llama, tokens, len(tokens), text, n)
        return text.raw.decode()

    def forward(self, tokens, pos=0):
        """Run tokens at the positions from pos on; return the logits after the last."""
        array = (ctypes.c_int * len(tokens))(*tokens)
        logits = self.c.llama_forward(self.llama, array, len(tokens), pos)
        return self.checked(logits)[: self.vocab_size]

    def generate(self, prompt="", seed=0, order=None, order_bias=3.0, **sampling):
        """
        Return the prompt and its continuation, after an order as in encode_order(), or None. The
        other keywords are fields of Sampling. A model that knows orders would make one up if the
        prompt were empty; it gets one without fields.
        """
        if not prompt and not order and self.c.llama_knows_orders(self.llama):
            order = {}
        usual = {"temperature": 1.0, "top_p": 0.9, "min_p": 0.0, "repeat_penalty": 1.0, "top_k": 0}
        sampling = Sampling(**{**usual, **sampling})
        is_ordered = order is not None
        tokens, n_order = self.encode(prompt), 0
        if is_ordered:
            tokens, n_order = self.encode_order(order, prompt)
        if len(tokens) > self.n_positions:
            what = "order and the prompt have" if n_order else "prompt has"
            raise ValueError(
                f"the {what} {len(tokens)} tokens, but the model's context is "
                f"{self.n_positions}: shorten the {'order' if n_order else 'prompt'}"
            )
        favored = ctypes.byref(order_of(order)) if is_ordered else None
        self.checked(self.c.llama_bias(self.llama, favored, order_bias))
        self.checked(self.c.llama_seed(self.llama, seed))
        new = tokens
        while len(tokens) <= self.n_positions:
            self.forward(new, len(tokens) - len(new))
            token = self.checked(self.c.llama_sample(self.llama, ctypes.byref(sampling)))
            if token in self.stop:
                break
            new = [token]
            tokens += new
        text = self.decode(tokens[n_order:])
        return text.removeprefix(" ") if is_ordered else text

    def hand_over(self):
        """Let another thread use the model."""
        self.checked(self.c.llama_hand_over(self.llama))

    def close(self):
        """Free the model."""
        self.checked(self.c.llama_free(self.llama))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__.strip())
    try:
        llama = Llama(sys.argv[1])
        print(llama.generate(*sys.argv[2:3], seed=1, temperature=0.8))
    except ValueError as e:
        sys.exit(f"error: {e}")
    llama.close()
