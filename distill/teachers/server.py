"""A teacher behind an OpenAI-compatible server, such as `vllm serve`, which scores rows over HTTP.

A row is posted to `/v1/completions` as token ids. The answer holds `prompt_logprobs`, vLLM's
addition to OpenAI's protocol: for each token the K most probable ids and the token itself.

The server's softmax runs over all rows of its embedding. Where those are more than the tokenizer's
ids, the padding rows keep the probability that the model gives them: next to nothing after
training, and nothing in the answer tells how much. A padding row among a top K is refused.

vLLM writes -inf as -9999, and must generate at least one token: `--max-model-len` has to be greater
than the longest row.

Letters: T tokens of a row, C candidates of all tokens, K support size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import partial
from itertools import zip_longest
from typing import Any

import numpy as np

from tutelage.distill.config.credentials import api_key, hidden
from tutelage.distill.config.faults import ConfigError
from tutelage.distill.config.teachers import TeacherConfig
from tutelage.distill.objectives import Needs, TeacherScores
from tutelage.distill.teachers.candidates import (
    BadCandidates,
    Candidates,
    check_linear,
    read_length,
)
from tutelage.distill.teachers.fingerprint import scored_row
from tutelage.distill.teachers.http_client import (
    ClientError,
    InvalidResponse,
    ServerClient,
    read_json,
)
from tutelage.distill.teachers.transport import QueryIds
from tutelage.scheduler.episodes import Row

PROBED = 64
"""How many ids, spread evenly over the vocabulary, have their texts compared; and how many of those
that were added to it."""

LISTED = 8
"""How many of a server's models a message names."""

LEAST = -9999.0
"""What vLLM writes for -inf."""


class ServerTeacher:
    """Scores rows by asking the server; this process holds no weights.

    Args:
        name, config: of the teacher. vocabulary: ids of the tokenizer.

    Raises:
        ConfigError: the environment variable for the key is missing or invalid.
    """

    model = None
    remote = True

    def __init__(self, name: str, config: TeacherConfig, *, vocabulary: int) -> None:
        self.name, self.vocabulary, self._model = name, vocabulary, config.model
        self._client = ServerClient(
            f"teachers.{name}",
            str(config.url),
            key=_key(name, config.api_key_env),
            timeout=config.timeout,
            attempts=config.attempts,
            concurrency=config.concurrency,
            max_answer_mib=config.max_answer_mib,
        )

    @property
    def retries(self) -> int:
        """How many requests had to be sent again, so far."""
        return self._client.retries

    def score(
        self, rows: Sequence[Row], needs: Needs, query_ids: QueryIds = None
    ) -> list[TeacherScores]:
        """See TransformersTeacher.score; without entropies.

        Raises:
            ValueError: more than a top K is asked for, or a row has branches.
            ConfigError: the server serves another model, or one that cannot score the rows.
            ServerError: no usable answer in all attempts.
        """
        if needs.student_k or needs.full:
            raise ValueError(
                f"teachers.{self.name}: a server answers with its own top K, and more was asked:"
                f" set teachers.{self.name}.engine to transformers"
            )
        check_linear(f"teachers.{self.name}", rows)
        return self._client.map_concurrently(
            [partial(self._score, row, needs.width) for row in rows]
        )

    def sleep(self) -> None:
        """The weights are on the server's device."""

    def wake(self) -> None:
        """See `sleep`."""

    def close(self) -> None:
        """See `sleep`."""

    def check(self, tokenizer: Any, *, k: int) -> None:
        """Check that the server answers, serves this model with the student's vocabulary, and gives
        K log-probabilities a token.

        Raises: as `score`.
        """
        probe = _probe(tokenizer)
        self._check_model()
        self._check_vocabulary(tokenizer, probe)
        self._score(scored_row(probe), k)

    def _score(self, row: Row, k: int) -> TeacherScores:
        end = read_length(row)
        body = {
            "model": self._model,
            "prompt": row.ids_T[:end].tolist(),
            "prompt_logprobs": k,
            "max_tokens": 1,  # vLLM must generate at least one token
            "temperature": 0,
            "add_special_tokens": False,
        }

        def read(answer: bytearray) -> TeacherScores:
            try:
                candidates = read_candidates(answer, tokens=end, model=self._model)
                return candidates.scores(row, k=k, vocabulary=self.vocabulary)
            except BadCandidates as error:  # a proxy's or an overloaded server's: worth a retry
                raise InvalidResponse(str(error)) from None

        try:
            return self._client.ask("/v1/completions", body, read=read)
        except ClientError as refused:
            raise self._mistake(refused, tokens=end, k=k) from None
        except ValueError as error:  # TeacherScores names the id, not whose it is
            raise ConfigError(
                f"teachers.{self.name}: {self._client.url}: {error}: choose a teacher with the"
                " student's tokenizer, served without padding rows"
            ) from None

    def _mistake(self, refused: ClientError, *, tokens: int, k: int) -> ConfigError:
        """What the user must change, to be read from the server's refusal."""
        where, text = f"teachers.{self.name}: {self._client.url}", refused.text
        # HTTP's status is 400 for all of the first three: only vLLM's words tell them apart
        if "max allowed" in text or "max_logprobs" in text:
            return ConfigError(
                f"{where} gives fewer than the {k} log-probabilities that the objective wants"
                f" ({text}): start it with --max-logprobs {k}, or lower objective.k"
            )
        if any(part in text for part in ("context length", "model length", "max_tokens")):
            return ConfigError(
                f"{where} cannot read a row of {tokens} tokens and one more ({text}): start it with"
                f" --max-model-len {tokens + 1} or more, or shorten the episodes"
                " (rollout.max_turns, rollout.max_new_tokens, rollout.context)"
            )
        if "vocab" in text:
            return ConfigError(
                f"{where} does not know the student's last ids ({text}): it serves a model of"
                " another vocabulary: choose a teacher with the student's tokenizer"
            )
        if refused.status in (401, 403):
            return ConfigError(
                f"{where} refuses the key ({text}): set teachers.{self.name}.api_key_env to the"
                " name of the environment variable that holds it"
            )
        if refused.status == 404:  # vLLM's answer to an unknown model: names those it serves
            self._check_model()
        return ConfigError(f"{where} refuses to score a row: {refused}: see its log")

    def _check_model(self) -> None:
        """Raises ConfigError where the server does not serve the teacher's model."""
        url = self._client.url
        try:
            found = self._client.ask("/v1/models", read=read_json)
            served = [hidden(str(model["id"])[:99]) for model in found["data"]]
        except ClientError as refused:
            if refused.status in (401, 403):
                raise self._mistake(refused, tokens=0, k=0) from None
            raise ConfigError(
                f"teachers.{self.name}.url: {url} is no OpenAI-compatible server: /v1/models is"
                f" {refused}: correct it, or start one there, such as vllm serve"
            ) from None
        except (KeyError, TypeError):
            raise ConfigError(
                f"teachers.{self.name}.url: {url} is no OpenAI-compatible server: it lists no"
                " models under /v1/models: correct it, or start one there, such as vllm serve"
            ) from None
        if self._model not in served:
            raise ConfigError(
                f"teachers.{self.name}.model: {url} serves {_listed(served)}, not"
                f" {self._model!r}: correct model or url, or start the server with"
                f" --served-model-name {self._model}"
            )

    def _check_vocabulary(self, tokenizer: Any, probe: Sequence[int]) -> None:
        """Raises ConfigError where ids stand for other texts than the student's. How the server
        would tokenize a text does not matter: it is sent ids."""
        body = {"model": self._model, "tokens": [*probe]}
        try:
            theirs = str(self._client.ask("/detokenize", body, read=read_json)["prompt"])
        except (ClientError, KeyError, TypeError):
            return  # /detokenize is vLLM's own; of other servers the self-test tells enough
        # without spaces: decoders differ in where they put them between unrelated ids
        theirs, ours = ("".join(text.split()) for text in (theirs, str(tokenizer.decode(probe))))
        if theirs != ours:
            pairs = enumerate(zip_longest(theirs, ours))
            at = next(i for i, (one, other) in pairs if one != other)
            raise ConfigError(
                f"teachers.{self.name}: {self._client.url} has another vocabulary: where the"
                f" student's ids say {ours[at : at + 20]!r}, its say"
                f" {hidden(theirs[at : at + 20])!r}:"
                " choose a teacher with the student's tokenizer"
            )


def _listed(names: Sequence[str]) -> str:
    shown = [repr(name) for name in names[:LISTED]]
    return ", ".join([*shown, *(["..."] if len(names) > LISTED else [])]) or "no model"


def check_server(name: str, config: TeacherConfig, tokenizer: Any, *, k: int) -> None:
    """Check that a teacher's server can teach in this run. k: how many ids it must score a token.

    Raises: as `ServerTeacher.score`.
    """
    ServerTeacher(name, config, vocabulary=len(tokenizer)).check(tokenizer, k=k)


def read_candidates(
    answer: bytes | bytearray, *, tokens: int, model: str | None = None
) -> Candidates:
    """A completion's `prompt_logprobs`. model: which one must have answered, if the answer says so.

    Raises:
        InvalidResponse: no JSON, not of so many tokens, or another model's.
    """
    try:
        # Arrays are made while the JSON is parsed, token by token: as Python objects the candidates
        # would take some 200 bytes each.
        found = json.loads(answer, object_pairs_hook=_packed)
        if said := found.get("error"):
            raise InvalidResponse(f"it answers with an error: {said!r}")
        if found.get("model", model) not in (model, None):
            raise InvalidResponse(f"its answer is of model {found['model']!r}, not {model!r}")
        (choice,) = found["choices"]
        parts = choice.get("prompt_logprobs")
        if parts is None:
            raise InvalidResponse("its answer has no prompt_logprobs: is it vLLM's server?")
        if not all(not part or isinstance(part, tuple) for part in parts):  # null: the first token
            raise TypeError("not every token has candidates by id")
        ids, logprobs = zip(*[part or _NOTHING for part in parts], strict=True)
        ends_T = np.cumsum([len(part) for part in ids])
        ids_C, logprobs_C = np.concatenate(ids), np.concatenate(logprobs)
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        if isinstance(error, InvalidResponse):  # it is a ValueError, too
            raise
        raise InvalidResponse(
            f"its answer is no completion with prompt_logprobs ({type(error).__name__}: {error})"
        ) from None
    if len(ids) != tokens:
        raise InvalidResponse(f"it answers with {len(ids)} positions for {tokens} tokens")
    return Candidates(
        ids_C=ids_C,
        logprobs_C=np.where(logprobs_C == LEAST, -np.inf, logprobs_C).astype(np.float32),
        starts_T=np.concatenate([[0], ends_T[:-1]]),
        ends_T=ends_T,
    )


_NOTHING = np.empty(0, dtype=np.int32), np.empty(0, dtype=np.float32)
_ID = re.compile(r"[0-9]+")
_NUMBERS = frozenset({float, int})


def _packed(pairs: list[tuple[str, Any]]) -> Any:
    """An object of the JSON, called for the innermost first: a candidate becomes its
    log-probability, a token's candidates two arrays, all else stays a dict."""
    if pairs and _ID.fullmatch(pairs[0][0]):
        ids, logprobs = zip(*pairs, strict=True)
        if not _NUMBERS.issuperset(map(type, logprobs)):  # numpy would read "-1.5", and true
            raise TypeError("a log-probability that is no number")
        with np.errstate(over="ignore"):  # -1e300 is as good as -inf
            return np.array(ids, dtype=np.int32), np.array(logprobs, dtype=np.float32)
    found = dict(pairs)
    return found.get("logprob", found)


def _probe(tokenizer: Any) -> list[int]:
    """Ids from all over the vocabulary, the last one too, and those that were added to it."""
    last = len(tokenizer) - 1  # a model with fewer ids than the student's fails at this one
    spread = np.linspace(0, last, num=min(PROBED, last + 1), dtype=np.int64).tolist()
    return sorted({*spread, *sorted(tokenizer.get_added_vocab().values())[:PROBED]})


def _key(name: str, variable: str | None) -> str | None:
    try:
        return None if variable is None else api_key(f"teachers.{name}", variable)
    except ValueError as error:
        raise ConfigError(str(error)) from None
