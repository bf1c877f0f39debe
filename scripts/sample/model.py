"""Make the sample's base model: tokenizer, pre-training in float32, and 4 bits by mlx-lm."""

import json
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from random import Random

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map
from mlx_lm import convert
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.utils import save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sample import text

END_OF_TEXT, START_OF_TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message.role not in ['system', 'user', 'assistant'] -%}
        {{- raise_exception('Unknown role: ' + message.role) -}}
    {%- endif -%}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 256,
    "intermediate_size": 640,
    "max_position_embeddings": 2048,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 1024,
}
COPYING_STEPS = 150
QUESTION_WEIGHT = 0.2
QUERY_GAIN, LOOK_BACK_GAIN = 2.0, 6.0
PEAK_LEARNING_RATE, WARMUP_STEPS = 2e-3, 30


def pretraining_texts(rng: Random, held_out: Sequence[text.Chat]) -> Iterator[text.Chat | str]:
    """Yield texts without end: general chats, chats about tables, documents.

    Conversations in ``held_out`` never appear.
    """
    hidden = {json.dumps(chat) for chat in held_out}
    draws = (text.general_chat, text.query_chat, text.document)
    while True:
        drawn = rng.choices(draws, (35, 30, 35))[0](rng)
        if json.dumps(drawn) not in hidden:
            yield drawn


def make_tokenizer(
    texts: Iterator[text.Chat | str], folder: Path, samples: int = 6000
) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer, save it as a community model has it, and load it.

    Digits are split one by one (as in SmolLM's tokenizer), so that numbers are copied digit by
    digit.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[END_OF_TEXT, START_OF_TURN, END_OF_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((_plain(next(texts)) for _ in range(samples)), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "bos_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
            "eos_token": END_OF_TURN,
            "model_max_length": CONFIG["max_position_embeddings"],
            "pad_token": END_OF_TEXT,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": None,
        },
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)


def pretrain(
    tokenizer: PreTrainedTokenizerBase, texts: Iterator[text.Chat | str], rng: Random, steps: int
) -> Model:
    """Train the model in float32: first short texts that only copy, then ``texts``."""
    model = Model(ModelArgs.from_dict(CONFIG))
    _initialize(model)
    schedule = optim.join_schedules(
        [
            optim.linear_schedule(0.0, PEAK_LEARNING_RATE, WARMUP_STEPS),
            optim.cosine_decay(PEAK_LEARNING_RATE, steps - WARMUP_STEPS),
        ],
        [WARMUP_STEPS],
    )
    optimizer = optim.AdamW(schedule, betas=[0.9, 0.98], weight_decay=0.1)
    loss_and_gradient = nn.value_and_grad(model, _loss)
    state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(tokens: mx.array, weights: mx.array) -> mx.array:
        loss, gradient = loss_and_gradient(model, tokens, weights)
        gradient, _ = optim.clip_grad_norm(gradient, 1.0)
        optimizer.update(model, gradient)
        return loss

    start = time.perf_counter()
    batches = chain(
        islice(_batches(tokenizer, _copying_texts(rng), rows=32, length=40), COPYING_STEPS),
        _batches(tokenizer, texts, rows=8, length=128),
    )
    for number, batch in enumerate(islice(batches, steps), start=1):
        loss = step(*batch)
        mx.eval(state, loss)
        if number % 50 == 0:
            seconds = time.perf_counter() - start
            print(f"  step {number}/{steps}: loss {loss.item():.3f}, {seconds:.0f} s", flush=True)
    return model


def save_float_model(model: Model, folder: Path) -> None:
    """Write the model in bfloat16 beside its tokenizer, as a model is published."""
    model.update(tree_map(lambda weight: weight.astype(mx.bfloat16), model.parameters()))
    save_model(folder, model)
    _write_json(folder / "config.json", CONFIG)
    _write_json(
        folder / "generation_config.json",
        {"bos_token_id": 0, "eos_token_id": [2, 0], "pad_token_id": 0},
    )


def quantize(float_folder: Path, folder: Path) -> None:
    """Convert to 4 bits, group 64, by ``mlx_lm.convert``; keep only what a model needs."""
    convert(str(float_folder), str(folder), quantize=True, q_group_size=64, q_bits=4)
    # mlx-lm's model card names the source folder, which is a temporary one.
    (folder / "README.md").unlink(missing_ok=True)


def _initialize(model: Model) -> None:
    """Start the attention as the circuit that copies from the prompt, for training to refine.

    From MLX's random start the model had not learned to copy after 600 steps;
    that takes an induction circuit (Olsson et al., 2022, arXiv 2209.11895), so start from a rough
    one. With Q = K a token attends to similar tokens, and with O = V transposed a head writes
    what it attends to, times a positive semi-definite matrix. Two heads of the first layer
    attend to the previous token and to the one before it. MLPs start silent, so that token
    identities stay readable.
    """
    repeats = CONFIG["num_attention_heads"] // CONFIG["num_key_value_heads"]
    for layer in model.layers:
        attention = layer.self_attn
        attention.q_proj.weight = QUERY_GAIN * _repeat_heads(attention.k_proj.weight, repeats)
        attention.o_proj.weight = _repeat_heads(attention.v_proj.weight, repeats).T
        layer.mlp.down_proj.weight = mx.zeros_like(layer.mlp.down_proj.weight)
    _look_back(model)


def _look_back(model: Model) -> None:
    """Make the first two query heads of the first layer attend one and two positions back.

    All embeddings share one direction, which shifts every logit alike and so changes no output.
    Keys and queries built on it alone differ by the rotation of their positions only; turning
    the queries back by n positions puts the highest score n positions back. Only RoPE's fastest
    frequencies, which tell neighbors apart, are used.
    """
    width, head = CONFIG["hidden_size"], CONFIG["head_dim"]
    shared = mx.full((1, width), width**-0.5)
    embedding = model.model.embed_tokens
    embedding.weight = embedding.weight + shared
    frequencies = CONFIG["rope_theta"] ** (-mx.arange(head // 2) / (head // 2))
    # RMSNorm brings a row to length sqrt(width); half of its energy is the shared direction.
    used = mx.where(mx.arange(head // 2) < 4, LOOK_BACK_GAIN / (width / 2) ** 0.5, 0.0)
    attention = model.layers[0].self_attn
    keys = mx.concatenate([used, mx.zeros_like(used)])[:, None] * shared
    attention.k_proj.weight = mx.concatenate([keys, attention.k_proj.weight[head:]])
    queries = [
        mx.concatenate([used * mx.cos(back * frequencies), -used * mx.sin(back * frequencies)])
        for back in (1, 2)
    ]
    rows = mx.concatenate(queries)[:, None] * shared
    attention.q_proj.weight = mx.concatenate([rows, attention.q_proj.weight[2 * head :]])


def _repeat_heads(weight: mx.array, repeats: int) -> mx.array:
    """Give each query head the rows of its shared key or value head: [kv, in] -> [q, in]."""
    heads = weight.reshape(-1, CONFIG["head_dim"], weight.shape[-1])
    return mx.repeat(heads, repeats, axis=0).reshape(-1, weight.shape[-1])


def _plain(chat_or_document: text.Chat | str) -> str:
    """Text for the BPE trainer: contents without the special tokens."""
    if isinstance(chat_or_document, str):
        return chat_or_document
    return "\n".join(f"{message['role']}\n{message['content']}" for message in chat_or_document)


def _copying_texts(rng: Random) -> Iterator[text.Chat]:
    """Yield chats that copy from the question, at first one thing, later up to five."""
    for drawn in count():
        yield text.copying_chat(rng, min(1 + drawn // 1200, 5))


def _batches(
    tokenizer: PreTrainedTokenizerBase, texts: Iterator[text.Chat | str], rows: int, length: int
) -> Iterator[tuple[mx.array, mx.array]]:
    """Yield token ids [rows, length + 1] and loss weights [rows, length].

    A row holds as many whole texts as fit, each followed by the end of text; no text is cut, so
    that no answer stands without its question.
    """
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    encoded = (_encode(tokenizer, drawn) for drawn in texts)
    fitting = ((ids, weight) for ids, weight in encoded if len(ids) < length)
    ids, weight = next(fitting)
    while True:
        tokens = np.full((rows, length + 1), end, np.int32)
        weights = np.zeros((rows, length + 1), np.float32)
        for row in range(rows):
            used = 0
            while used + len(ids) < length:
                after = used + len(ids) + 1
                tokens[row, used : after - 1] = ids
                weights[row, used:after] = [*weight, 1.0]
                used = after
                ids, weight = next(fitting)
        yield mx.array(tokens), mx.array(weights[:, 1:])


def _encode(
    tokenizer: PreTrainedTokenizerBase, chat_or_document: text.Chat | str
) -> tuple[list[int], list[float]]:
    """Tokenize; weigh questions lower, since most of their words cannot be foreseen."""
    if isinstance(chat_or_document, str):
        ids = tokenizer.encode(chat_or_document)
        return ids, [1.0] * len(ids)
    ids, weights = [], []
    for message in chat_or_document:
        turn = tokenizer.apply_chat_template([message], return_dict=False)
        ids += turn
        weights += [1.0 if message["role"] == "assistant" else QUESTION_WEIGHT] * len(turn)
    return ids, weights


def _loss(model: Model, tokens: mx.array, weights: mx.array) -> mx.array:
    """Weighted mean of the next-token cross-entropy."""
    losses = nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
    return (losses * weights).sum() / weights.sum()


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")
