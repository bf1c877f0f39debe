"""The model card: what it says, and what it leaves as it was."""

import re
from dataclasses import replace
from typing import Any

import pytest
import yaml

from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.publishing.card import Card, CardFacts, hub_id, write_card
from mlx_fusekit.publishing.foreign_text import code, plain, public_source
from mlx_fusekit.publishing.licenses import License

REPO = "me/sql-model"
BASE = "mlx-community/sample-4bit"


def with_recipe(facts: CardFacts, **changes: Any) -> CardFacts:
    recipe = {**(facts.model.recipe or {}), **changes}
    return replace(facts, model=replace(facts.model, recipe=recipe))


def front_matter(card: str) -> dict[str, Any]:
    found = re.match(r"---\n(.*?)\n---\n\n", card, re.DOTALL)
    assert found is not None
    value = yaml.safe_load(found[1])
    assert isinstance(value, dict)
    return value


class TestFrontMatter:
    def test_of_a_new_card(self, facts: CardFacts) -> None:
        known = replace(facts, license=License("apache-2.0"), languages=("en",))
        assert front_matter(write_card(known)) == {
            "library_name": "mlx",
            "pipeline_tag": "text-generation",
            "tags": ["mlx", "mlx-fusekit"],
            "license": "apache-2.0",
            "language": ["en"],
            "base_model": BASE,
            "base_model_relation": "finetune",
        }

    def test_of_a_model_that_was_only_quantized(self, facts: CardFacts) -> None:
        card = write_card(with_recipe(facts, adapters=[], quantize={"bits": 4}, kind="none"))
        assert front_matter(card)["base_model_relation"] == "quantized"
        assert f"[{BASE}](https://huggingface.co/{BASE})" in card
        assert "quantized by mlx-fusekit." in card
        assert "fused" not in card

    def test_what_was_there_is_kept(self, facts: CardFacts) -> None:
        existing = Card.parse(
            "---\ndatasets: [me/questions]\ntags: [sql, mlx]\nlicense: other\n"
            "license_name: mine\nlicense_link: LICENSE\nlanguage: ko\n"
            f"base_model: [{BASE}, me/adapter]\nlibrary_name: transformers\n"
            "pipeline_tag: text2text-generation\n---\nText.\n"
        )
        own = replace(facts, license=License("other"))
        assert front_matter(write_card(own, existing)) == {
            "datasets": ["me/questions"],
            "tags": ["mlx", "mlx-fusekit", "sql"],
            "license": "other",
            "license_name": "mine",
            "license_link": "LICENSE",
            "language": "ko",
            "base_model": [BASE, "me/adapter"],
            "base_model_relation": "finetune",
            "library_name": "mlx",
            "pipeline_tag": "text2text-generation",
        }

    def test_a_license_that_is_asked_for_replaces_another(self, facts: CardFacts) -> None:
        existing = Card.parse("---\nlicense: other\nlicense_name: mine\n---\n")
        card = write_card(replace(facts, license=License("mit")), existing)
        assert front_matter(card)["license"] == "mit"
        assert "license_name" not in front_matter(card)

    @pytest.mark.parametrize("name", ["/home/me/llama", "llama", None])
    def test_a_base_that_is_no_hub_id_is_not_named(self, facts: CardFacts, name: Any) -> None:
        local = with_recipe(facts, base={"id": name})
        card = write_card(local, Card({"base_model": "/Users/me/llama"}, ""))
        assert "base_model" not in front_matter(card)
        assert "base_model_relation" not in front_matter(card)
        assert "/Users" not in card
        assert "/home" not in card

    def test_a_base_that_people_named_is_kept(self, facts: CardFacts) -> None:
        local = with_recipe(facts, base={"id": "llama"})
        card = write_card(local, Card({"base_model": ["meta/llama", "/x/y"]}, ""))
        assert front_matter(card)["base_model"] == "meta/llama"

    def test_yaml_cannot_be_broken_out_of(self, facts: CardFacts) -> None:
        odd = {"title": "a: b\n---\n# c", "n": [1, {"x": None}], "emoji": "한국어"}
        assert front_matter(write_card(facts, Card(odd, ""))).items() >= odd.items()

    def test_what_we_do_not_know_is_kept_as_it_was(self, facts: CardFacts) -> None:
        known = (
            "model-index:\n- name: x\n  results: []\n  note: ours\n"
            "zebra: 1\napple:\n  deep: [1, null]\nwidget:\n- text: 한국어\n"
        )
        once = write_card(facts, Card.parse(f"---\n{known}---\nWords.\n"))
        metadata = front_matter(once)
        assert metadata.items() >= yaml.safe_load(known).items()
        assert [key for key in metadata if key in known] == [
            "model-index", "zebra", "apple", "widget",
        ]  # fmt: skip
        assert write_card(facts, Card.parse(once)) == once

    @pytest.mark.parametrize(
        ("front", "message"),
        [
            (": [", "not valid YAML"),
            ("[" * 5000, "not valid YAML"),
            ("- 1", "must be a mapping of names to values"),
            ("2024: x", "must be a mapping of names to values"),
            ("date: 2024-13-45", "must be a mapping of names to values .month must be"),
        ],
    )
    def test_one_that_cannot_be_read(self, front: str, message: str) -> None:
        with pytest.raises(CheckpointError, match=f"^here/README.md: its front .*{message}") as e:
            Card.parse(f"---\n{front}\n---\n", "here/README.md")
        assert "\n" not in str(e.value)


class TestText:
    def test_a_new_card_has_a_title(self, facts: CardFacts) -> None:
        text = Card.parse(write_card(facts)).text
        assert text.lstrip().startswith("# sql-model\n\n<!-- mlx-fusekit")

    @pytest.mark.parametrize(
        "text",
        [
            "# Mine\n\nWords.\n",
            "Words without an end",
            "\n\n# Mine\n",
            "---\n---\n# Mine\n",
            "a\r\nb\r\n",
        ],
    )
    def test_text_of_ones_own_stays(self, facts: CardFacts, text: str) -> None:
        existing = Card.parse(text)
        card = write_card(facts, existing)
        assert Card.parse(card).own_text == existing.own_text
        assert existing.own_text
        assert "# sql-model" not in card

    def test_twice_is_the_same(self, facts: CardFacts) -> None:
        once = write_card(facts, Card.parse("# Mine\n\nBefore.\n"))
        changed = once.rstrip("\n") + "\n\nAfter.\n"
        twice = write_card(facts, Card.parse(changed))
        assert twice == changed
        other = write_card(with_recipe(facts, requantize="calibrated"), Card.parse(changed))
        assert other != changed
        assert Card.parse(other).own_text == Card.parse(changed).own_text

    def test_a_rule_in_the_text_is_no_front_matter(self) -> None:
        assert Card.parse("Words.\n\n---\n\na: b\n\n---\n").metadata == {}

    @pytest.mark.parametrize("keep", ["end", "begin", "both twice"])
    def test_damaged_markers(self, facts: CardFacts, keep: str) -> None:
        card = write_card(facts)
        markers = re.findall(r"<!-- mlx-fusekit.*?-->", card)
        assert len(markers) == 2
        damaged = {
            "end": card.replace(markers[0], ""),
            "begin": card.replace(markers[1], ""),
            "both twice": card + card,
        }[keep]
        with pytest.raises(CheckpointError, match="marker"):
            write_card(facts, Card.parse(damaged))


class TestWhatItSays:
    def test_of_the_sample(self, facts: CardFacts) -> None:
        card = write_card(facts)
        assert f"[{BASE}](https://huggingface.co/{BASE}) (revision `0123456789ab`)" in card
        assert "with `adapter` (lora) fused into it" in card
        assert "| re-quantized | rounded to nearest |" in card
        assert re.search(r"\| merged modules \| \d+ \|", card)
        assert re.search(r"\| matrices \| \d+ x 4-bit group 64 \|", card)
        assert "| size | 1.7 MB |" in card
        assert "without a report of `mlx-fusekit verify`" in card
        assert f'mlx_lm.generate --model {REPO} --prompt "Hello"' in card
        assert "ollama" not in card.lower()
        assert "| license | not known" in card

    def test_of_a_calibrated_one(self, facts: CardFacts) -> None:
        calibration = {
            "source": "the adapter's training data (sql/train.jsonl)",
            "tokens": 8192,
            "widened": {"a": 5, "b": 6},
        }
        adapters = [{"id": "me/sql-lora", "weight": 0.5}, {"id": "style", "weight": 1.0}]
        card = write_card(
            with_recipe(facts, requantize="calibrated", calibration=calibration, adapters=adapters)
        )
        assert "8,192 tokens: the adapter's training data (sql/train.jsonl) |" in card
        assert "| given other widths | 2 modules |" in card
        link = "[me/sql-lora](https://huggingface.co/me/sql-lora) (weight 0.5)"
        assert f"{link} and `style` (lora)" in card

    def test_without_a_recipe(self, facts: CardFacts) -> None:
        card = write_card(replace(facts, model=replace(facts.model, recipe=None)))
        assert "This is not recorded" in card
        assert "base_model" not in card

    @pytest.mark.parametrize("junk", [None, "x", [1], {"id": {}}, {"tokens": "many"}])
    def test_a_recipe_of_another_shape(self, facts: CardFacts, junk: Any) -> None:
        keys = ("base", "adapters", "kind", "requantize", "calibration", "modules", "versions")
        assert "## Use" in write_card(with_recipe(facts, **dict.fromkeys(keys, junk)))

    @pytest.mark.parametrize("weight", ["half", 10**400, float("inf"), [1]])
    def test_a_weight_that_is_no_number(self, facts: CardFacts, weight: Any) -> None:
        card = write_card(with_recipe(facts, adapters=[{"id": "style", "weight": weight}]))
        assert re.search(r"`style` \(weight (nan|inf)\)", card)

    def test_names_cannot_write_markdown(self, facts: CardFacts) -> None:
        bad = "x`|\n## Boo <script>alert(1)</script> [a](http://b)"
        card = write_card(
            with_recipe(
                facts,
                adapters=[{"id": bad}],
                kind=bad,
                versions={bad: bad},
                calibration={"source": f"generated by {bad}", "tokens": 3},
            )
        )
        section = Card.parse(card).text
        assert "\n## Boo" not in section
        outside = re.sub(r"`[^`\n]*`", "", re.sub(r"<!--.*?-->", "", section))
        assert "<" not in outside.replace("(<", "")
        assert "](http://b" not in outside

    def test_a_license_with_a_link(self, facts: CardFacts) -> None:
        gemma = License("other", "gemma", "https://ai.google.dev/gemma/terms")
        card = write_card(replace(facts, license=gemma))
        assert "| license | [gemma](<https://ai.google.dev/gemma/terms>) |" in card


def test_small_things() -> None:
    assert hub_id("owner/name") == "owner/name"
    for no_id in ("/home/me/x", "./x", "x", "~/x/y", "C:\\x", "a/b/c", "../x", None, 3):
        assert hub_id(no_id) is None
    assert code("a`b|c\nd") == "`a b c d`"
    assert plain("a|b\n<c>*d*") == "a b c d"
    assert public_source("/home/me/x.txt") == "`x.txt`"
