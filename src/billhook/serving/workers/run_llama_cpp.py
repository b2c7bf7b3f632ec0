"""Runs libllama (llama-cpp-py-sync) on a CPU for each request: `{"do": NAME, ...}`."""

import json
import os
import sys
import time
import traceback
from importlib import import_module
from typing import Any

import numpy as np

WARNING, CONTINUED = 3, 5  # levels of ggml's log
KINDS = {"F32": 0, "F16": 1, "Q8_0": 7, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18}  # values of llama.h's `llama_ftype`


class Loaded:
    """A loaded GGUF file with a context. The KV cache is F32 unless `cache` names another type."""

    def __init__(self, ffi: Any, lib: Any, file: str, context: int, threads: int, cache: str) -> None:  # noqa: ANN401 - C
        self.ffi = ffi
        self.lib = lib
        options = lib.llama_model_default_params()
        options.n_gpu_layers = 0
        self.model = lib.llama_model_load_from_file(file.encode(), options)
        if self.model == ffi.NULL:
            raise RuntimeError("the file cannot be loaded")
        settings = lib.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = context
        settings.n_threads = settings.n_threads_batch = threads
        settings.type_k = settings.type_v = KINDS[cache]
        settings.flash_attn_type = 0 if cache == "F32" else -1
        settings.no_perf = True
        self.context = lib.llama_init_from_model(self.model, settings)
        if self.context == ffi.NULL:
            lib.llama_model_free(self.model)
            raise RuntimeError("no context can be created for the model")
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))

    def clear(self) -> None:
        """Clears the KV cache."""
        lib = self.lib
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)

    def decode(self, tokens: list[int], after: int, every: bool) -> Any:  # noqa: ANN401 - an array
        """Returns the logits `[tokens, vocabulary]` after every token, or after the last."""
        lib = self.lib
        batch = lib.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens):
                batch.token[i] = token
                batch.pos[i] = after + i
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = 0
                batch.logits[i] = every or i + 1 == len(tokens)
            if status := lib.llama_decode(self.context, batch):
                raise RuntimeError(f"llama_decode returned {status}")
        finally:
            lib.llama_batch_free(batch)
        rows = len(tokens) if every else 1
        logits = lib.llama_get_logits(self.context)
        return np.frombuffer(self.ffi.buffer(logits, rows * self.vocabulary * 4), np.float32).reshape(rows, -1).copy()

    def free(self) -> None:
        """Frees the context and the model."""
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)


Answer = dict[str, Any]


class Engine:
    """The requests of this script. One file is loaded at a time."""

    def __init__(self) -> None:
        bindings = import_module("llama_cpp_py_sync._cffi_bindings")
        self.ffi = bindings.get_ffi()
        self.lib = bindings.get_lib()
        self.log = self.ffi.callback("ggml_log_callback", self.note)  # kept, as C holds no reference
        self.lib.llama_log_set(self.log, self.ffi.NULL)
        self.lib.llama_backend_init()
        self.loaded: Loaded | None = None
        self.errors = list[str]()

    def note(self, level: int, text: Any, _: Any) -> None:  # noqa: ANN401 - C
        """Writes warnings and errors to standard error, for the parent process."""
        if WARNING <= level < CONTINUED:
            message = self.ffi.string(text).decode(errors="replace").strip()
            print(message, file=sys.stderr, flush=True)
            self.errors += [message] if level > WARNING else []

    def load(self, file: str, context: int, threads: int, cache: str) -> Answer:
        """Loads a file in place of the previous file."""
        if self.loaded is not None:
            self.loaded.free()
            self.loaded = None
        self.loaded = Loaded(self.ffi, self.lib, file, context, threads, cache)
        return {"vocabulary": self.loaded.vocabulary}

    def logits(self, tokens: list[int], out: str) -> Answer:
        """Writes the logits after every token to a .npy file."""
        assert self.loaded
        self.loaded.clear()
        np.save(out, self.loaded.decode(tokens, 0, True))
        return {}

    def greedy(self, tokens: list[int], count: int) -> Answer:
        """Returns greedy tokens, and the seconds of prefill and decoding."""
        assert self.loaded
        self.loaded.clear()
        start = time.perf_counter()
        generated = [int(self.loaded.decode(tokens, 0, False)[-1].argmax())]
        prefilled = time.perf_counter()
        while len(generated) < count:
            after = len(tokens) + len(generated) - 1
            generated.append(int(self.loaded.decode(generated[-1:], after, False)[-1].argmax()))
        return {"tokens": generated, "prefill": prefilled - start, "decoding": time.perf_counter() - prefilled}

    def tokenize(self, text: str) -> Answer:
        """Returns the tokens of a text without special tokens, or None without a vocabulary."""
        assert self.loaded
        ffi = self.ffi
        lib = self.lib
        data = text.encode()
        vocabulary = lib.llama_model_get_vocab(self.loaded.model)
        if lib.llama_vocab_type(vocabulary) == 0:
            return {"tokens": None}
        capacity = len(data) + 8
        tokens = ffi.new("llama_token[]", capacity)
        count = lib.llama_tokenize(vocabulary, data, len(data), tokens, capacity, False, False)
        if count < 0:
            raise RuntimeError("llama_tokenize needs a larger buffer")
        return {"tokens": list(tokens[0:count])}

    def quantize(self, file: str, out: str, kind: str, threads: int) -> Answer:
        """Writes a quantized file."""
        ffi = self.ffi
        lib = self.lib
        options = lib.llama_model_quantize_default_params()
        options.ftype = KINDS[kind]
        options.nthread = threads
        if status := lib.llama_model_quantize(file.encode(), out.encode(), ffi.addressof(options)):
            raise RuntimeError(f"llama_model_quantize returned {status}")
        return {}


REQUESTS = ("load", "logits", "greedy", "tokenize", "quantize")


def main() -> None:
    """Answers requests until the input ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # C's output must not mix with answers
    engine = Engine()
    for line in sys.stdin:
        request = json.loads(line)
        name = request.pop("do")
        engine.errors = []
        assert name in REQUESTS
        try:
            answer = getattr(engine, name)(**request)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": "; ".join([str(error), *engine.errors])}
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
