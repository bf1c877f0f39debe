"""Generated text: its kinds, that the seed decides it, and that nothing global is touched."""

import mlx.core as mx
import pytest

from mlx_fusekit.texts import generate
from mlx_fusekit.texts.generate import generate_sequences
from mlx_fusekit.texts.sampler import Report, Sampler

TOKENS = 900


@pytest.fixture(scope="module")
def sequences(babbler, tokenizer):
    return generate_sequences(babbler, tokenizer, tokens=TOKENS, seed=0)


def count(sequences):
    return sum(len(sequence.tokens) for sequence in sequences)


def conversations(sequences):
    return [sequence for sequence in sequences if sequence.scored > 1]


def plain_texts(sequences):
    return [sequence for sequence in sequences if sequence.scored == 1]


def test_the_budget_is_met_with_different_texts(sequences) -> None:
    assert 0.9 * TOKENS <= count(sequences) < TOKENS + 2 * 100
    assert len(set(sequences)) == len(sequences)
    assert not any(sequence.is_answer for sequence in sequences)


def test_both_kinds_appear_in_their_shares_and_mixed(sequences) -> None:
    assert 0.55 < count(conversations(sequences)) / count(sequences) < 0.85
    kinds = [sequence.scored > 1 for sequence in sequences]
    assert kinds != sorted(kinds)
    assert kinds != sorted(kinds, reverse=True)


def test_users_write_half_of_the_length(sequences, tokenizer) -> None:
    frame = len(tokenizer.encode("<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"))
    users = [s.scored - frame for s in conversations(sequences)]
    # Half of it in sampled tokens; nonsense takes more when it is tokenized again.
    assert 8 < max(users) < TOKENS // 16


def test_a_conversation_is_the_templates_around_the_models_own_messages(
    sequences, tokenizer
) -> None:
    for sequence in conversations(sequences):
        prompt = tokenizer.decode(sequence.tokens[: sequence.scored])
        message = prompt.removeprefix("<|im_start|>user\n").removesuffix(
            "<|im_end|>\n<|im_start|>assistant\n"
        )
        assert message == message.strip() != ""
        assert "<|" not in message
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": message}], add_generation_prompt=True
        )
        assert list(sequence.tokens[: sequence.scored]) == rendered
        answer = sequence.tokens[sequence.scored :]
        ends = [place for place, t in enumerate(answer) if t in tokenizer.eos_token_ids]
        assert ends in ([], [len(answer) - 1])


def test_the_text_is_of_the_adapters_domain(sample_base, sample_teacher, tokenizer) -> None:
    def share_of_sql(model):
        found = generate_sequences(model, tokenizer, tokens=300, seed=0, chat_share=1.0)
        answers = [tokenizer.decode(s.tokens[s.scored :]) for s in found]
        return sum(answer.startswith("SELECT") for answer in answers) / len(answers)

    assert share_of_sql(sample_teacher) > 0.8
    assert share_of_sql(sample_base) < 0.3


def test_plain_texts_are_words_and_end_at_most_once(sequences, tokenizer) -> None:
    for sequence in plain_texts(sequences):
        assert sequence.tokens[0] == tokenizer.bos_token_id
        assert not set(sequence.tokens[1:-1]) & {0, 1, 2}
        assert len(sequence.tokens) <= TOKENS // 16
        assert sequence.tokens[-1] != 1


def test_the_seed_decides_and_the_global_state_is_left_alone(babbler, tokenizer, sequences) -> None:
    mx.random.seed(5)
    before = [state.tolist() for state in mx.random.state]
    again = generate_sequences(babbler, tokenizer, tokens=TOKENS, seed=0)
    assert [state.tolist() for state in mx.random.state] == before
    assert again == sequences
    other = generate_sequences(babbler, tokenizer, tokens=TOKENS, seed=1)
    shared = set(other) & set(sequences)
    # A short text may be written twice.
    assert len(shared) < len(sequences) / 4


def test_without_a_template_all_is_plain(babbler, tokenizer) -> None:
    class Bare:
        bos_token_id = None

        def __len__(self):
            return len(tokenizer)

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def apply_chat_template(self, *_, **__):
            raise ValueError("tokenizer.chat_template is not set")

    found = generate_sequences(babbler, Bare(), tokens=300, seed=0)
    assert count(found) >= 270
    assert not conversations(found)
    # Without a BOS token, each begins with one of the vocabulary, which is not a special one.
    starts = {sequence.tokens[0] for sequence in found}
    assert len(starts) > 3
    assert not starts & {0, 1, 2}


def test_models_whose_caches_cannot_be_batched(babbler, tokenizer, monkeypatch) -> None:
    from mlx_lm.models import cache

    class Alone(cache.KVCache):
        merge = property()  # which hasattr does not see

    monkeypatch.setattr(babbler, "make_cache", lambda: [Alone()], raising=False)
    found = generate_sequences(babbler, tokenizer, tokens=300, seed=0, length=60)
    assert count(found) >= 270
    assert conversations(found)
    assert plain_texts(found)
    assert found == generate_sequences(babbler, tokenizer, tokens=300, seed=0, length=60)


class Fixed:
    """A model that always goes on in the same way."""

    def __init__(self, model, token):
        self._model = model
        self._token = token
        self.layers = model.layers

    def __call__(self, inputs, cache=None):
        logits = self._model(inputs, cache=cache)
        return mx.where(mx.arange(logits.shape[-1]) == self._token, 1000.0, logits)


def test_a_model_that_ends_at_once_gives_no_text(babbler, tokenizer) -> None:
    assert generate_sequences(Fixed(babbler, 2), tokenizer, tokens=200, seed=0) == []


class Chain:
    """A model in which every token has one successor, or several."""

    def __init__(self, model, successors):
        self._successors = successors
        self._model = model
        self.layers = model.layers

    def __call__(self, inputs, cache=None):
        logits = self._model(inputs, cache=cache)
        rows = [
            [[100.0 if t in self._successors(last) else 0.0 for t in range(1024)] for last in row]
            for row in inputs.tolist()
        ]
        return mx.array(rows) + 0 * logits


def test_any_special_token_ends_the_users_message(babbler, tokenizer) -> None:
    class OneEnd:
        eos_token_ids = frozenset({2})
        bos_token_id = None
        pad_token_id = None

        def __len__(self):
            return len(tokenizer)

        def __getattr__(self, name):
            return getattr(tokenizer, name)

    cat, dog = tokenizer.encode(" cat")[0], tokenizer.encode("dog")[0]
    # After the template's line feed a cat, then a special token, then dogs for ever.
    model = Chain(babbler, lambda last: {cat: [0], 0: [dog], dog: [dog]}.get(last, [cat]))
    found = conversations(generate_sequences(model, OneEnd(), tokens=100, seed=0))
    assert len(found) == 1
    messages = {tokenizer.decode(s.tokens[: s.scored]) for s in found}
    assert messages == {"<|im_start|>user\ncat<|im_end|>\n<|im_start|>assistant\n"}


def test_no_text_is_found_twice(babbler, tokenizer) -> None:
    words = [tokenizer.encode(word)[0] for word in (" cat", " dog")]
    # Two words and then the end: few different texts, and the rest of the tokens stays unwritten.
    model = Chain(babbler, lambda last: [2] if last in words else words)
    found = generate_sequences(model, tokenizer, tokens=2000, seed=0)
    assert len(found) == len(set(found)) == 4


def test_one_token_again_and_again_is_no_plain_text(babbler, tokenizer) -> None:
    model = Fixed(babbler, tokenizer.encode(" cat")[0])
    assert not plain_texts(generate_sequences(model, tokenizer, tokens=200, seed=0))


def test_no_text_has_tokens_that_stand_for_nothing(babbler, tokenizer) -> None:
    class Tokenizer:
        eos_token_ids = frozenset({2})
        pad_token_id = 900

        def __len__(self):
            return 950

        def __getattr__(self, name):
            return getattr(tokenizer, name)

    class Drifting(Fixed):
        def __call__(self, inputs, cache=None):
            logits = self._model(inputs, cache=cache)
            ids = mx.arange(logits.shape[-1])
            return mx.where((ids == 0) | (ids == 900) | (ids >= 950), 50.0, logits)

    found = generate_sequences(Drifting(babbler, 0), Tokenizer(), tokens=300, seed=0)
    written = {t for s in found for t in s.tokens[s.scored :]}
    assert written
    assert not written & ({0, 900} | set(range(950, 1024)))


def test_a_recited_template_is_no_plain_text(babbler, tokenizer) -> None:
    sampler = Sampler(babbler, tokenizer, 0, Report(None, 0))
    before = tokenizer.encode("<|im_start|>system\nYou are a helpful teacher.<|im_end|>\n")
    plain = generate._PlainTexts(sampler, generate._Pieces(before, ""), 50, 100)
    assert plain._recites(tokenizer.encode("xsystem\nYou are a helpful teacher.\n"))
    assert plain._recites(tokenizer.encode("system, and the cat came."))
    assert not plain._recites(tokenizer.encode("The system has a helpful teacher."))
    without = generate._PlainTexts(sampler, None, 50, 100)
    assert not without._recites(tokenizer.encode("system\nYou are a helpful teacher.\n"))


def test_a_users_turn_may_end_in_plain_characters(babbler, tokenizer) -> None:
    def render(messages, *, tokenize, **_):
        text = f"[INST] {messages[0]['content']} [/INST]"
        return tokenizer.encode(text) if tokenize else text

    class Instructed:
        apply_chat_template = staticmethod(render)

        def __len__(self):
            return len(tokenizer)

        def __getattr__(self, name):
            return getattr(tokenizer, name)

    pieces = generate._template_pieces(Instructed())
    assert tokenizer.decode(pieces.before) == "[INST]"
    sampler = Sampler(babbler, tokenizer, 0, Report(None, 0))
    opening = tokenizer.encode(" How many cats? [/INST] Five.")
    assert generate._message(sampler, opening, pieces) == "How many cats?"


def test_progress_rises_to_the_whole(babbler, tokenizer) -> None:
    calls = []
    generate_sequences(
        babbler, tokenizer, tokens=200, seed=0, progress=lambda *both: calls.append(both)
    )
    done = [done for done, _ in calls]
    assert done == sorted(set(done))
    assert calls[-1] == (200, 200)
