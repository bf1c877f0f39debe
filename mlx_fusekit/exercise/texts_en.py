"""The exercise in English; ``texts_ko`` has the same keys with the same placeholders."""

from collections.abc import Mapping

TEXTS: Mapping[str, str] = {
    # --- the lesson ---------------------------------------------------------------------------
    "title": "Is fusing worth it? {model} with {adapter}",
    "intro": (
        "An adapter can stay beside its base and be swapped for another at any time. Or it can be "
        "fused: written into the base's weights, so that one model comes out. This exercise fuses "
        "the adapter `{adapter}` into the model `{model}`, checks that the result still is the "
        "fine-tune, times (a) base with adapter and (b) the fused model, and leaves one question "
        "to you: is fusing worth losing swappability?"
    ),
    "step_fuse": "Step 1 of 4: fuse",
    "merge_lora": (
        "An adapted layer computes `W x + s B (A x)`: W is the weight that the base has stored, "
        "and A and B are the two thin matrices that were trained (their rank is {rank} here); s is "
        "a fixed scale ({scale} here). `s*B*A` has the same shape as W, so both can be added up "
        "once and for all: `W' = W + s*B*A`. From then on the extra multiplications are gone. So "
        "is the way back: from W' alone, nobody can take the adapter out again. Layers that are "
        "merged: {modules}."
    ),
    "merge_dora": (
        "An adapted layer computes with `W + s*B*A`, where W is the weight that the base stores, "
        "A and B are two thin matrices that were trained (their rank is {rank} here) and s is a "
        "fixed scale ({scale} here). DoRA then gives each row of the sum a length that was "
        "trained as well. All of that can be worked out once and for all and stored as one matrix "
        "W'. From then on the extra work is gone. So is the way back: from W' alone, nobody can "
        "take the adapter out again. Layers that are merged: {modules}."
    ),
    "merge_full": (
        "This fine-tune holds whole weights, not the thin matrices of a LoRA (`W + s*B*A`): fusing "
        "writes them in the place of the base's. From the fused model alone, nobody can take them "
        "out again. Layers that are merged: {modules}."
    ),
    "rounding": (
        "The base is quantized ({formats}): in each small group of weights a weight can only be "
        "one of a few steps, 16 of them at 4 bits. The sum lies between the steps, and has to go "
        "back to them. `mlx_lm.fuse` rounds each weight to the nearest step. But what the adapter "
        "adds is often smaller than a step, and then much of what it learned is rounded away. "
        "`mlx-fusekit fuse` runs text through base and adapter first, and chooses the steps such "
        "that what comes out of the layers changes least. The size stays the same."
    ),
    "no_rounding": (
        "The base is not quantized, so the sum can be stored almost as it is: only the last digits "
        "of the numbers are rounded."
    ),
    "fused_by": "{name}: {seconds}, {size}",
    "peer_failed": "mlx_lm.fuse cannot fuse this model; going on without it. It said: {line}",
    "peer_ignores_nothing": (
        "mlx_lm.fuse has no --ignore and would fuse the whole adapter; going on without it."
    ),
    "step_parity": "Step 2 of 4: is it still the fine-tune?",
    "parity_explained": (
        "Each fused model is read back from the disk and runs beside base+adapter on the same "
        "{tokens} tokens ({data}). KL tells how far its probabilities for the next token are from "
        "those of base+adapter; 0 is the same. Top-1 is the share of tokens for which both find "
        "the same next token most likely. Exact match is the share of answers of which every "
        "token is the most likely one."
    ),
    "data_generated": "text that base+adapter wrote",
    "parity_table": "How close to base+adapter?",
    "column_kl": "KL",
    "column_top1": "top-1",
    "column_exact": "exact match",
    "row_dropped": "base, adapter dropped",
    "parity_both": (
        "The KL from base+adapter is {calibrated} nats a token for `mlx-fusekit fuse` and "
        "{rounded} for `mlx_lm.fuse`; with the adapter dropped it is {base}."
    ),
    "parity_ours": (
        "The KL from base+adapter is {calibrated} nats a token for `mlx-fusekit fuse`; with the "
        "adapter dropped it is {base}."
    ),
    "parity_depends": (
        "How much rounding costs depends on the adapter: the smaller what it adds is against a "
        "step, the more is lost. `mlx-fusekit inspect ADAPTER --model BASE` shows that size."
    ),
    "step_timing": "Step 3 of 4: time (a) base+adapter and (b) the fused model",
    "timing_explained": (
        "All get the same prompt of {prompt} tokens and generate {generated} tokens. After a "
        "warm-up they take turns, {trials} times each, in an order that spreads heat and other "
        "programs evenly. The table has medians: until the first token is there, and for each "
        "token after it."
    ),
    "timing_table": "How fast?",
    "column_first": "first token",
    "column_per_token": "per token",
    "column_rate": "tokens/s",
    "row_base": "base",
    "row_adapted": "(a) base+adapter",
    "row_fused": "(b) fused",
    "interval_explained": (
        "How many times as fast (b) is comes with an interval in which the true value lies with "
        "95 % confidence. An interval that holds 1 means: no difference can be told. Each round "
        "times both, one right after the other, and the figure is the median of the rounds' "
        "ratios, which need not be the ratio of the medians above."
    ),
    "speed_faster": (
        "The fused model is faster: {ratio} times as fast a token as base+adapter "
        "(95 % interval {low} to {high}, {trials} rounds)."
    ),
    "speed_slower": (
        "The fused model is slower: {ratio} times as fast a token as base+adapter "
        "(95 % interval {low} to {high}, {trials} rounds)."
    ),
    "speed_no_difference": (
        "No difference can be told: the fused model is {ratio} times as fast a token as "
        "base+adapter, and the 95 % interval, {low} to {high} ({trials} rounds), holds 1."
    ),
    "speed_too_few": (
        "The trials are too few to tell: the fused model was about {ratio} times as fast a token "
        "as base+adapter in {trials} rounds, and a verdict takes at least {fewest} (`-n`)."
    ),
    "step_cost": "Step 4 of 4: what it costs",
    "cost_explained": (
        "One base in memory can serve many adapters. Fused, each fine-tune is a whole model, on "
        "the disk as in memory. You said that you use this many adapters: {adapters} "
        "(`--adapters`)."
    ),
    "cost_table": "What do they cost?",
    "column_swappable": "swappable",
    "column_fused": "fused",
    "cost_disk_one": "disk, adapters: 1",
    "cost_disk_many": "disk, adapters: {adapters}",
    "cost_each": "disk, each adapter more",
    "cost_load": "to load another",
    "cost_make": "to make one",
    "cost_memory": "memory, at most",
    "step_answer": "Your turn",
    "question": (
        "Is it worth losing swappability? Write two sentences: what does fusing gain on this "
        "machine, and what would you lose, with as many adapters as you use?"
    ),
    "no_plots": "No pictures: they need matplotlib (pip install 'mlx-fusekit[plot]').",
    "written": "Your report: {path}",
    "next": "Write your two sentences into it, then see whether it is complete:",
    "took": "All of it took {seconds}.",
    "warning": "warning",
    "caution_busy": (
        "Other programs kept this machine busy when the timing began (load {load}): the times are "
        "less sure."
    ),
    "caution_drift": (
        "The time of a trial changed by {share} while they ran: the order balances that, but a "
        "machine at rest gives a narrower interval."
    ),
    "caution_unsteady": "These did not write the same text each time: {arms}.",
    # --- the report ---------------------------------------------------------------------------
    "report_intro": (
        "Written by `mlx-fusekit exercise` from one run on one machine; every figure is in "
        "`report.json` beside it."
    ),
    "heading_fuse": "1. Fuse",
    "heading_parity": "2. Is it still the fine-tune?",
    "heading_timing": "3. Time (a) base+adapter and (b) the fused model",
    "heading_cost": "4. What it costs",
    "heading_answer": "5. Your answer",
    "heading_run": "This run",
    "column_command": "command",
    "column_time": "time",
    "column_size": "size",
    "column_model": "model",
    "caption_parity": (
        "How far each model is from base+adapter, on a logarithmic axis: each mark to the left is "
        "ten times closer."
    ),
    "caption_timing": (
        "Left: the time for a token in each trial, with a bar at the median. Right: the time "
        "before each token along a generation, with the middle 80 % of the trials shaded."
    ),
    "answer_here": "(Write your two sentences here, in the place of this line.)",
    "answer_keep": "Leave the two lines around your answer as they are; `--check` looks there.",
    "model_answer": "A model answer from your own figures (write yours first)",
    "answer_break_even": (
        "Every 1,000 tokens it saves {saved}; fusing took {fuse}, so that an adapter has to "
        "generate about {tokens} tokens before fusing it has paid."
    ),
    "answer_unclear_break_even": (
        "After how many tokens fusing has paid cannot be told: the difference of the medians is "
        "too small for that."
    ),
    "answer_disk_one": (
        "On the disk, base and adapter take {swappable} and the fused model {separate}; each "
        "adapter more would take {adapter} swappable and {fused} fused."
    ),
    "answer_disk_many": (
        "On the disk, {adapters} adapters take {swappable} with their one base and {separate} as "
        "fused models; each adapter more takes {adapter} swappable and {fused} fused."
    ),
    "decide_fuse_one": (
        "With a single adapter there is nothing to swap, so I would fuse it once it will generate "
        "more than that, and keep the adapter's own files for the way back."
    ),
    "decide_fuse_many": (
        "So I would fuse only an adapter that will generate more than that and is nearly always "
        "the one in use, and leave the others swappable beside one base."
    ),
    "decide_keep_one": (
        "So speed is no reason to fuse here: I would leave the adapter as it is, and fuse only "
        "for a place that cannot load adapters."
    ),
    "decide_keep_many": (
        "So speed is no reason to lose swappability here: I would leave the adapters beside one "
        "base, and fuse only for a place that cannot load adapters."
    ),
    "decide_later": (
        "So I would not decide yet: I would leave the adapter swappable, and measure again with "
        "more trials."
    ),
    "run_what": "what",
    "run_value": "value",
    "run_machine": "machine",
    "run_system": "system",
    "run_device": "MLX runs on",
    "run_versions": "versions",
    "run_settings": "settings",
    "run_data": "text for the parity",
    "run_fingerprint": "fingerprint of the machine",
    "run_caution": "caution",
    "machine": "{chip}, {cores} cores, {memory}",
    # --- the check ----------------------------------------------------------------------------
    "check_complete": "{name} is complete.",
    "check_incomplete": "{name} is not complete yet:",
    "missing_json": "report.json is missing beside it; put it back, or run the exercise again",
    "damaged_json": "report.json beside it is damaged or no exercise's; run the exercise again",
    "other_json": (
        "report.json beside it is not the one that it was written from; put that one back, or run "
        "the exercise again"
    ),
    "other_machine": (
        "it was measured on another machine (fingerprint {theirs}; this one has {ours}); run the "
        "exercise here, or check with --any-machine"
    ),
    "figure_missing": "figure {arm} is missing from the table in part 3",
    "figure_differs": (
        "figure {arm} is not the one of report.json: the table in part 3 has {found}, and should "
        "have {expected}"
    ),
    "answer_place_missing": (
        "the place of your answer is gone; put your sentences between the lines {start} and {end}"
    ),
    "answer_missing": "your answer is missing; write two sentences between {start} and {end}",
    "answer_short": "the answer needs at least two sentences; there are this many: {count}",
    "answer_off_topic": (
        "the answer does not mention the trade-off yet: say what fusing gains (speed, say) or what "
        "it loses (swapping adapters, disk, memory)"
    ),
    # --- what takes long ----------------------------------------------------------------------
    "step: generating text": "generating text",
    "step: re-quantizing": "re-quantizing",
    "step: measuring": "measuring",
    "step: writing": "writing",
    "step: comparing": "comparing",
    "step: comparing files": "comparing files",
    "step: warming up": "warming up",
    "step: timing": "timing",
    "step: loading": "loading",
}
