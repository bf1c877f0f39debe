"""Reading text: what is scored, what is refused, and how much is taken."""

import json

import pytest
from mlx_lm.tuner.datasets import ChatDataset, CompletionsDataset, TextDataset

from mlx_fusekit.errors import ConfigurationError
from mlx_fusekit.texts.data import TrainingData, read_sequences, training_data
from mlx_fusekit.texts.sequences import TokenSequence

QUESTION = "How many cars have color 'red'?"
ANSWER = "SELECT COUNT(*) FROM cars WHERE color = 'red';"
CHAT = {
    "messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
}


class Templated:
    """A tokenizer with another chat template, or none."""

    def __init__(self, tokenizer, render=None):
        self._tokenizer = tokenizer
        self._render = render

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def apply_chat_template(self, messages, *, tokenize=True, add_generation_prompt=False, **_):
        if self._render is None:
            raise ValueError("tokenizer.chat_template is not set")
        text = self._render(messages, add_generation_prompt)
        return self._tokenizer.encode(text, add_special_tokens=False) if tokenize else text


def write(path, *items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items), "utf-8")
    return path


def read(tmp_path, tokenizer, *items, **options):
    return read_sequences(write(tmp_path / "data.jsonl", *items), tokenizer, **options)


def answer(sequence, tokenizer):
    return tokenizer.decode(sequence.tokens[sequence.scored :])


def test_each_line_is_read_as_mlx_lm_trains_on_it(tmp_path, tokenizer) -> None:
    completion = {"prompt": QUESTION, "completion": ANSWER}
    text = {"text": ANSWER}
    chat, completed, plain = read(tmp_path, tokenizer, CHAT, completion, text)
    trained = ChatDataset([], tokenizer).process(CHAT)[0]
    assert list(chat.tokens) == trained[: len(chat.tokens)]
    # mlx-lm also trains on the line feed behind the end-of-turn token.
    assert tokenizer.decode(trained[len(chat.tokens) :]) == "\n"
    masked = CompletionsDataset([], tokenizer, "prompt", "completion", True).process(completion)
    assert completed == chat
    assert completed.scored == masked[1]
    assert list(plain.tokens) == TextDataset([], tokenizer).process(text)[0]
    assert (plain.scored, plain.is_answer) == (1, False)


def test_an_answer_is_scored_from_its_start_to_its_end_of_turn(tmp_path, tokenizer) -> None:
    again = {"messages": [*CHAT["messages"], CHAT["messages"][0], {**CHAT["messages"][1]}]}
    again["messages"][-1]["content"] = "The last one."
    for sequence, expected in zip(
        read(tmp_path, tokenizer, CHAT, again), (ANSWER, "The last one."), strict=True
    ):
        assert sequence.is_answer
        assert answer(sequence, tokenizer) == f"{expected}<|im_end|>"


def test_a_conversation_that_ends_with_the_user_is_text(tmp_path, tokenizer) -> None:
    (sequence,) = read(tmp_path, tokenizer, {"messages": CHAT["messages"][:1]})
    assert (sequence.scored, sequence.is_answer) == (1, False)
    assert tokenizer.decode(sequence.tokens) == f"<|im_start|>user\n{QUESTION}<|im_end|>\n"


def test_tools_reach_the_template(tmp_path, tokenizer) -> None:
    seen = []

    class Recording(Templated):
        def apply_chat_template(self, messages, *, tools=None, **options):
            seen.append(tools)
            return super().apply_chat_template(messages, **options)

    plain = Recording(tokenizer, lambda messages, _: "".join(m["content"] for m in messages))
    read(tmp_path, plain, {**CHAT, "tools": [{"name": "sum"}]})
    assert seen == [[{"name": "sum"}]] * 2


def test_a_template_that_renders_the_prompt_otherwise_scores_everything(
    tmp_path, tokenizer
) -> None:
    def render(messages, generation):
        return f"{len(messages)} messages: " + " ".join(m["content"] for m in messages)

    (sequence,) = read(tmp_path, Templated(tokenizer, render), CHAT)
    assert (sequence.scored, sequence.is_answer) == (1, False)
    assert tokenizer.decode(sequence.tokens) == f"2 messages: {QUESTION} {ANSWER}"


def test_without_a_template_completions_follow_their_prompt(tmp_path, tokenizer) -> None:
    bare = Templated(tokenizer)
    completed, chat = read(tmp_path, bare, {"prompt": "Count: ", "completion": ANSWER}, CHAT)
    assert completed.is_answer
    assert answer(completed, tokenizer) == f"{ANSWER}<|im_end|>"
    assert tokenizer.decode(completed.tokens) == f"Count: {ANSWER}<|im_end|>"
    assert tokenizer.decode(chat.tokens) == f"{QUESTION}\n{ANSWER}<|im_end|>"
    assert (chat.scored, chat.is_answer) == (1, False)


def test_a_conversation_the_template_refuses_is_text(tmp_path, tokenizer) -> None:
    parts = [{"type": "text", "text": "found it"}, {"type": "image"}]
    messages = [{"role": "tool", "content": parts}, {"role": "assistant", "content": None}]
    (sequence,) = read(tmp_path, tokenizer, {"messages": messages})
    assert tokenizer.decode(sequence.tokens) == "found it<|im_end|>"


def test_long_sequences_are_cut(tmp_path, tokenizer) -> None:
    (whole,) = read(tmp_path, tokenizer, CHAT)
    for length, scored in ((whole.scored + 3, whole.scored), (whole.scored, 1)):
        (cut,) = read(tmp_path, tokenizer, CHAT, max_length=length)
        assert cut == TokenSequence(whole.tokens[:length], scored, is_answer=False)
    assert read(tmp_path, tokenizer, CHAT, max_length=len(whole.tokens)) == [whole]


def test_sequences_that_predict_nothing_are_dropped(tmp_path, tokenizer) -> None:
    assert len(read(tmp_path, tokenizer, {"text": ""}, {"text": "A cat."})) == 1


@pytest.mark.parametrize("begins", [False, True])
def test_plain_text_is_cut_into_windows(tmp_path, tokenizer, begins) -> None:
    class WithStart(Templated):
        def encode(self, text, add_special_tokens=True, **options):
            start = [self.bos_token_id] if add_special_tokens else []
            return start + self._tokenizer.encode(text, **options)

    text = f"{QUESTION} {ANSWER}\n" * 5
    path = tmp_path / "notes.md"
    path.write_text("\ufeff" + text, "utf-8")
    sequences = read_sequences(path, WithStart(tokenizer) if begins else tokenizer, max_length=32)
    assert {len(s.tokens) for s in sequences[:-1]} == {32}
    assert all((s.tokens[0] == tokenizer.bos_token_id) == begins for s in sequences)
    kept = [token for s in sequences for token in s.tokens[begins:]]
    assert tokenizer.decode(kept) == text


def test_a_folder_is_its_training_text(tmp_path, tokenizer) -> None:
    write(tmp_path / "test.jsonl", {"text": "of the test"})
    assert "test" in tokenizer.decode(read_sequences(tmp_path, tokenizer)[0].tokens)
    write(tmp_path / "train.jsonl", {"text": "of the training"})
    (sequence,) = read_sequences(tmp_path, tokenizer)
    assert "training" in tokenizer.decode(sequence.tokens)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ("[" * 100_000, "not JSON"),
        ('{"question": "?"}', "none of mlx-lm's formats"),
        ('{"text": 3}', '"text" must be a string'),
        ('{"prompt": "a", "completion": null}', '"completion" must be a string'),
        ('{"messages": "hello"}', '"messages" must be a list'),
        ('{"messages": []}', '"messages" must be a list'),
        ('{"messages": [{"content": "no role"}]}', '"messages" must be a list'),
    ],
)
def test_a_bad_line_is_named(tmp_path, tokenizer, line, what) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(CHAT) + "\n\n" + line + "\n", "utf-8")
    with pytest.raises(ConfigurationError) as caught:
        read_sequences(path, tokenizer)
    message = str(caught.value)
    assert message.startswith(f"{path}:3: {what}")
    assert "; " in message
    assert "\n" not in message


def test_files_that_cannot_be_read_are_named(tmp_path, tokenizer) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"abc\xff")
    (tmp_path / "folder").mkdir()
    for path, what in (
        (empty, "holds no text"),
        (binary, "not UTF-8 text at byte 3"),
        (tmp_path / "missing.jsonl", "no such file"),
        (tmp_path / "folder", "has no train.jsonl"),
    ):
        with pytest.raises(ConfigurationError, match=what) as caught:
            read_sequences(path, tokenizer)
        assert str(path) in str(caught.value)


def test_a_selection_is_seeded_and_grows(tmp_path, tokenizer) -> None:
    items = [{"text": f"The number {n} and nothing else."} for n in range(40)]
    path = write(tmp_path / "data.jsonl", *items)
    few = read_sequences(path, tokenizer, tokens=60, seed=1)
    more = read_sequences(path, tokenizer, tokens=120, seed=1)
    assert 60 <= sum(len(s.tokens) for s in few) < 80
    assert more[: len(few)] == few
    assert read_sequences(path, tokenizer, tokens=60, seed=2) != few
    whole = read_sequences(path, tokenizer)
    assert len(whole) == 40
    assert set(more) < set(whole)
    # From all over the file, not from its beginning.
    assert max(whole.index(s) for s in more) > 20


def test_training_data_is_found_where_it_exists(tmp_path, monkeypatch) -> None:
    adapter = tmp_path / "outer" / "adapter"
    adapter.mkdir(parents=True)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    config = {"data": "sql"}
    assert training_data(config, adapter) is None
    for root in (tmp_path / "outer", adapter, work):
        (root / "sql").mkdir()
        before = training_data(config, adapter)
        assert before is None or before.folder.resolve() != root / "sql"
        write(root / "sql" / "train.jsonl", {"text": "a"})
        assert training_data(config, adapter).folder.resolve() == root / "sql"
    named = training_data({"data": str(adapter / "sql")}, work)
    assert named == TrainingData(adapter / "sql")
    assert training_data({"data": "sql", "hf_dataset": {"path": "x"}}, adapter) is None


@pytest.mark.parametrize(
    "data", [None, 3, "", ["sql"], "org/name", "a\0b", "x" * 5000, "~nobody-of-that-name/x"]
)
def test_training_data_that_is_no_folder_is_none(tmp_path, data) -> None:
    assert training_data({"data": data}, tmp_path) is None
    assert training_data({}, tmp_path) is None
