"""Loading and checking models and tokenizers: the one place that knows where weights come from."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tutelage.distill.config.faults import ConfigError
from tutelage.distill.config.run import RunConfig
from tutelage.distill.config.sections import StudentConfig
from tutelage.distill.models.architecture import (
    check_architecture,
    check_forward,
    check_weights,
)
from tutelage.distill.models.scratch import scratch_settings
from tutelage.distill.models.student import Student
from tutelage.distill.models.threads import cores
from tutelage.envs.errors import one_line
from tutelage.evaluation.run_folder import STATE, SUMS, WEIGHTS, Damaged, check

BUILTIN = "builtin:"
"""`builtin:NAME` names a tiny model that ships with the package, in distill/tiny/NAME."""

TINY = Path(__file__).parents[1] / "tiny"


def resolve(reference: str) -> str:
    """A folder for `builtin:NAME`, else the path or hub id itself.

    Raises:
        ConfigError: no such built-in model, or a path that is no folder.
    """
    if reference.startswith(BUILTIN):
        folder = TINY / reference.removeprefix(BUILTIN)
        if not (folder / "tokenizer.json").is_file():
            known = sorted(p.parent.name for p in TINY.glob("*/tokenizer.json"))
            raise ConfigError(f"model {reference!r} is not built in: there are {', '.join(known)}")
        return str(folder)
    # A hub id is OWNER/NAME. Anything else that is no folder is a mistyped path: say so, and do not
    # ask the hub for it.
    looks_like_path = reference.startswith((".", "/", "~")) or reference.count("/") != 1
    path = Path(reference).expanduser()
    if path.is_dir():
        return str(path)
    if looks_like_path:
        raise ConfigError(f"model {reference!r}: there is no such folder")
    return reference


@contextmanager
def at_key(key: str, *, but: type[Exception] | tuple[()] = ()) -> Iterator[None]:
    """Errors raised inside name `key`. but: errors that pass unchanged."""
    try:
        yield
    except but:
        raise
    except ValueError as error:
        said = str(error)
        raise ConfigError(said if said.startswith(key) else f"{key}: {said}") from error


def load_tokenizer(reference: str) -> Any:
    """The tokenizer of a folder, hub id or built-in model.

    Where tokenizer_config.json names no model's own class, tokenizer.json is the whole truth:
    AutoTokenizer would take the class of the model's type instead (transformers 5), with other
    splits and extra tokens.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    settings = Path(resolve(reference)) / "tokenizer_config.json"
    try:
        kind = dict(json.loads(settings.read_bytes())).get("tokenizer_class")
    except FileNotFoundError:
        kind = None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        check_loadable(settings.parent, weights=False)
        raise ConfigError(f"model {reference!r}: {settings} does not load: {error}") from None
    generic = kind in ("TokenizersBackend", "PreTrainedTokenizerFast")
    loader = PreTrainedTokenizerFast if generic else AutoTokenizer
    tokenizer = _loading(reference, "tokenizer", loader.from_pretrained)
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        backend.no_truncation()  # a file may ask for either, and every prompt would be cut
        backend.no_padding()
    return tokenizer


def load_settings(reference: str) -> Any:
    """A model's configuration, without weights."""
    from transformers import AutoConfig

    return _loading(reference, "configuration", AutoConfig.from_pretrained)


def load_generation(reference: str) -> Any | None:
    """A model's settings for generation; None: it has none."""
    from transformers import GenerationConfig

    try:
        return _loading(reference, "generation_config.json", GenerationConfig.from_pretrained)
    except ConfigError:
        if (Path(resolve(reference)) / "generation_config.json").is_file():
            raise
        return None


def _loading(reference: str, what: str, load: Any, **given: Any) -> Any:
    """What `load` makes of a model's files; code that comes with them is never run."""
    check_loadable(Path(resolve(reference)), weights=what == "weights")
    try:
        return load(resolve(reference), trust_remote_code=False, **given)
    except ConfigError:
        raise
    except Exception as error:  # a broken file makes transformers raise errors of any type
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"model {reference!r}: its {what} needs code of its own (auto_map), which is never"
                " run here: choose a model whose type transformers knows"
            ) from None
        raise ConfigError(
            f"model {reference!r}: its {what} does not load: {one_line(error):.300}"
        ) from None


def device_of(name: str) -> torch.device:
    """`auto` is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def load_model(reference: str, *, dtype: str, device: str) -> Any:
    """A causal language model, in evaluation mode: without dropout rollouts and updates agree."""
    from transformers import AutoModelForCausalLM

    who = f"model {reference!r}"
    check_architecture(load_settings(reference), who)
    model, found = _loading(
        reference,
        "weights",
        AutoModelForCausalLM.from_pretrained,
        dtype=getattr(torch, dtype),
        attn_implementation="sdpa",
        ignore_mismatched_sizes=True,  # `_check_keys` names them
        output_loading_info=True,
    )
    _check_keys(found, who)
    return _checked(model.to(device_of(device)).eval(), who)


def _check_keys(found: Mapping[str, Any], who: str) -> None:
    """Refuse weights that do not match the model: transformers would initialise missing ones at
    random, skip unknown ones, and only warn."""
    if other := sorted(found["mismatched_keys"]):
        name, there, here = other[0]
        raise ConfigError(
            f"{who}: {name} has shape {tuple(there)} in its files and {tuple(here)} by its"
            f" config.json{_more(other)}: one of the two is another model's"
        )
    for keys, fault in (("missing_keys", "have no"), ("unexpected_keys", "hold an unknown")):
        if names := sorted(found[keys]):
            raise ConfigError(
                f"{who}: its weight files {fault} {names[0]!r}{_more(names)}: they are incomplete,"
                " or of another model than its config.json: fetch or save them again"
            )


def _more(names: Sequence[Any]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def load_student(config: StudentConfig, *, seed: int, vocabulary: int) -> Student:
    """The student over the tokenizer's ids, as it is before its first update."""
    return Student(load_initial(config, seed=seed), vocabulary=vocabulary)


def load_initial(config: StudentConfig, *, seed: int) -> Any:
    """The model that the student begins as: a checkpoint's, or one of weights drawn from `seed`."""
    if config.model is not None:
        return load_model(config.model, dtype=config.dtype, device=config.device)
    from transformers import AutoModelForCausalLM

    settings = student_settings(config)
    check_architecture(settings, "student.init")
    with torch.random.fork_rng():  # the caller's random state stays as it was
        torch.manual_seed(seed)
        try:
            model = AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa")
        except Exception as error:  # of sizes that do not fit each other
            raise ConfigError(
                f"student.init: a {settings.model_type!r} of this kind cannot be made:"
                f" {one_line(error):.300}"
            ) from None
    # Drawn in float32, then narrowed: every dtype begins from the same numbers.
    model = model.to(getattr(torch, config.dtype))
    return _checked(model.to(device_of(config.device)).eval(), "student.init")


def _checked(model: Any, who: str) -> Any:
    check_weights(model, who)
    check_forward(model, who)
    return model


def student_settings(config: StudentConfig) -> Any:
    """The student's model configuration, without weights."""
    if config.model is not None:
        return load_settings(config.model)
    return scratch_settings(config.init or {}, load_tokenizer(student_tokenizer(config)))


def student_tokenizer(config: StudentConfig) -> str:
    """Where the student's tokenizer is."""
    reference = config.tokenizer or config.model
    assert reference is not None
    return reference


def check_vocabularies(config: RunConfig) -> int:
    """The number of ids that student and teachers share. Reads no weights. A server whose files are
    not here is checked elsewhere (teachers/build.py).

    Raises:
        ConfigError: a teacher whose tokenizer gives any token another id.
    """
    with at_key("student.tokenizer" if config.student.tokenizer else "student.model"):
        tokenizer = load_tokenizer(student_tokenizer(config.student))
    vocabulary = tokenizer.get_vocab()
    size = len(tokenizer)
    if config.student.model is not None:
        _check_room(config.student.model, size, "student.model")
        check_architecture(load_settings(config.student.model), "student.model")
    else:
        check_architecture(student_settings(config.student), "student.init")
    for name, teacher in config.teachers.items():
        if (files := teacher.tokenizer) is None:
            continue
        with at_key(f"teachers.{name}.{'weights' if teacher.engine == 'server' else 'model'}"):
            other = load_tokenizer(files)
        theirs = other.get_vocab()
        if theirs != vocabulary:
            token = min(  # the first by name: the same token every time
                (t for t in {*vocabulary, *theirs} if vocabulary.get(t) != theirs.get(t)), key=str
            )
            raise ConfigError(
                f"teachers.{name}: its vocabulary differs from the student's: token {token!r} is id"
                f" {vocabulary.get(token)} for the student and {theirs.get(token)} for"
                f" {files!r}; choose a teacher with the student's tokenizer"
            )
        if other.eos_token_id != tokenizer.eos_token_id:
            raise ConfigError(
                f"teachers.{name}: it ends with {other.eos_token!r}, the student with"
                f" {tokenizer.eos_token!r}: on that token the teacher misleads; set eos_token in"
                f" {files!r}, or mask it with objective.mask_tokens and give the"
                " teacher a tokenizer with the student's EOS"
            )
        _check_room(files, size, f"teachers.{name}.model")
    return size


def _check_room(reference: str, size: int, key: str) -> None:
    # More rows than ids are common (padding to a multiple of 64), and take no probability.
    rows = load_settings(reference).get_text_config().vocab_size
    if rows < size:
        raise ConfigError(
            f"{key}: {reference!r} has {rows} embedding rows for a tokenizer of {size} ids: it"
            " belongs to another vocabulary"
        )


def prepare_process(threads: int | None) -> None:
    """Set torch's threads (two processes with two threads each on two cores ran 11 times slower
    than with one), and let glibc keep freed memory: by default every large tensor is mapped,
    faulted in and unmapped anew, which cost a fifth of an update.
    """
    torch.set_num_threads(threads or cores())
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        return  # another C library: nothing to set


def check_loadable(folder: Path, *, weights: bool) -> None:
    """Check the checksums of a run's checkpoint that is about to be loaded as a model: of its
    configuration and tokenizer, and if `weights`, of its weights. Any other folder passes.

    Raises:
        ConfigError: names the damaged file and the cure.
    """
    if not (folder / SUMS).is_file() or not (folder / STATE).is_file():
        return
    try:
        check(folder, without=(STATE,) if weights else (STATE, WEIGHTS))
    except Damaged as error:
        raise ConfigError(
            f"{folder} is damaged ({error}): put it back from a copy, or take another checkpoint"
        ) from None
