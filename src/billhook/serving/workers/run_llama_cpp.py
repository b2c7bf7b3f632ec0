"""Runs libllama, of the package llama-cpp-py-sync, on a CPU, for each request: `{"do": a name of REQUESTS, ...}`."""

import json
import os
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

WARNING, CONTINUED = 3, 5  # levels of ggml's log
KINDS = {"F32": 0, "F16": 1, "Q8_0": 7, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18}  # values of llama.h's `llama_ftype`


class Loaded:
    """A GGUF file in memory, with a context for rows of tokens; keys and values are kept in F32 unless said otherwise."""

    def __init__(self, ffi: Any, lib: Any, file: str, context: int, threads: int, cache: str) -> None:  # noqa: ANN401 - C
        self.ffi, self.lib = ffi, lib
        options = lib.llama_model_default_params()
        options.n_gpu_layers = 0
        self.model = lib.llama_model_load_from_file(file.encode(), options)
        if self.model == ffi.NULL:
            raise RuntimeError("it does not load the file")
        wanted = lib.llama_context_default_params()
        wanted.n_ctx = wanted.n_batch = wanted.n_ubatch = context
        wanted.n_threads = wanted.n_threads_batch = threads
        wanted.type_k = wanted.type_v = KINDS[cache]
        wanted.flash_attn_type = 0 if cache == "F32" else -1
        wanted.no_perf = True
        self.context = lib.llama_init_from_model(self.model, wanted)
        if self.context == ffi.NULL:
            lib.llama_model_free(self.model)
            raise RuntimeError("it makes no context for the model")
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))

    def clear(self) -> None:
        """Forgets what was read."""
        lib = self.lib
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)

    def read(self, tokens: list[int], after: int, every: bool) -> Any:  # noqa: ANN401 - an array
        """Returns the logits after each of the tokens, or the last, which come after so many others: [tokens, vocabulary]."""
        lib = self.lib
        batch = lib.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, after + i, 1, 0
                batch.logits[i] = every or i + 1 == len(tokens)
            if status := lib.llama_decode(self.context, batch):
                raise RuntimeError(f"llama_decode ends with {status}")
        finally:
            lib.llama_batch_free(batch)
        rows = len(tokens) if every else 1
        logits = lib.llama_get_logits(self.context)
        return np.frombuffer(self.ffi.buffer(logits, rows * self.vocabulary * 4), np.float32).reshape(rows, -1).copy()

    def free(self) -> None:
        """Frees both."""
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)


class Engine:
    """The requests that this script answers; one file is loaded at a time."""

    def __init__(self) -> None:
        bindings: Any = import_module("llama_cpp_py_sync._cffi_bindings")
        self.ffi, self.lib = bindings.get_ffi(), bindings.get_lib()
        self.log = self.ffi.callback("ggml_log_callback", self.note)  # kept, as C holds no reference
        self.lib.llama_log_set(self.log, self.ffi.NULL)
        self.lib.llama_backend_init()
        self.loaded: Loaded | None = None
        self.errors = list[str]()

    def note(self, level: int, text: Any, _: Any) -> None:  # noqa: ANN401 - C
        """Writes warnings and errors where the process that asks looks for them."""
        if WARNING <= level < CONTINUED:
            said = self.ffi.string(text).decode(errors="replace").strip()
            print(said, file=sys.stderr, flush=True)
            self.errors += [said] if level > WARNING else []

    def load(self, file: str, context: int, threads: int, cache: str) -> dict[str, Any]:
        """Loads a file in place of the one before."""
        if self.loaded is not None:
            self.loaded.free()
            self.loaded = None
        self.loaded = Loaded(self.ffi, self.lib, file, context, threads, cache)
        return {"vocabulary": self.loaded.vocabulary}

    def logits(self, tokens: list[int], out: str) -> dict[str, Any]:
        """Writes the logits after each token to a .npy file."""
        assert self.loaded
        self.loaded.clear()
        np.save(out, self.loaded.read(tokens, 0, True))
        return {}

    def greedy(self, tokens: list[int], count: int) -> dict[str, Any]:
        """Returns the most likely tokens after these, and the seconds of reading and of writing."""
        assert self.loaded
        self.loaded.clear()
        begun = time.perf_counter()
        written = [int(self.loaded.read(tokens, 0, False)[-1].argmax())]
        read = time.perf_counter()
        while len(written) < count:
            after = len(tokens) + len(written) - 1
            written.append(int(self.loaded.read(written[-1:], after, False)[-1].argmax()))
        return {"tokens": written, "read": read - begun, "written": time.perf_counter() - read}

    def tokenize(self, text: str) -> dict[str, Any]:
        """Returns the tokens of a text, without any put around it; without a vocabulary, none."""
        assert self.loaded
        ffi, lib = self.ffi, self.lib
        data, vocabulary = text.encode(), lib.llama_model_get_vocab(self.loaded.model)
        if lib.llama_vocab_type(vocabulary) == 0:
            return {"tokens": None}
        room = len(data) + 8
        tokens = ffi.new("llama_token[]", room)
        count = lib.llama_tokenize(vocabulary, data, len(data), tokens, room, False, False)
        if count < 0:
            raise RuntimeError("llama_tokenize needs more room")
        return {"tokens": list(tokens[0:count])}

    def quantise(self, file: str, out: str, kind: str, threads: int) -> dict[str, Any]:
        """Writes a file with weights of another kind."""
        ffi, lib = self.ffi, self.lib
        options = lib.llama_model_quantize_default_params()
        options.ftype, options.nthread = KINDS[kind], threads
        if status := lib.llama_model_quantize(file.encode(), out.encode(), ffi.addressof(options)):
            raise RuntimeError(f"llama_model_quantize ends with {status}")
        return {"bytes": Path(out).stat().st_size}


REQUESTS = ("load", "logits", "greedy", "tokenize", "quantise")


def main() -> None:
    """Answers requests until there are no more."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what C prints is no answer
    engine = Engine()
    for line in sys.stdin:
        request = json.loads(line)
        name, engine.errors = request.pop("do"), []
        assert name in REQUESTS
        try:
            answer = getattr(engine, name)(**request)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": "; ".join([str(error), *engine.errors])}
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
