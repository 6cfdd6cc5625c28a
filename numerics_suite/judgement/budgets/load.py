"""Budgets of the `load.*` checks: counts of what must not happen, so every limit but one is 0."""

from __future__ import annotations

import math

from numerics_suite.core.records import Budget

LARGEST_GAIN = 10 * math.sqrt(2)
"""Ten times the largest gain of a standard initialiser.

A weight's gain is its root mean square times the square root of its fan-in: 0.58 for torch's default, 1 for LeCun,
at most 1.41 for Xavier (Glorot & Bengio 2010) and He (He et al. 2015), 0.02 * sqrt(hidden) = 1.28 for normal(0, 0.02)
at hidden size 4,096. Logits of a normalised state have that standard deviation; a decade above the largest, softmax
is one-hot and the first loss is noise.
"""

BUDGETS = (
    Budget(
        check="load.config",
        measurement="ignored",
        limit=0,
        cause="ignored-config",
        title="config.json has keys that this transformers ignores: {parameters}",
        reason="The installed transformers does not read these keys, so the model was built with defaults in their "
        "place and computes something else than the checkpoint was trained for. This is what happens when a "
        "checkpoint saved by transformers 5.x (rope_parameters, dtype) is opened by 4.x.",
        remedies=("fix-config", "newer-version"),
    ),
    Budget(
        check="load.config",
        measurement="differing",
        limit=0,
        cause="ignored-config",
        title="the model was built with other values than config.json says: {parameters}",
        reason="The value in the file did not reach the model, so it computes with another definition than the one "
        "that was trained.",
        remedies=("fix-config", "newer-version"),
    ),
    Budget(
        check="load.complete",
        measurement="without-scales",
        limit=0,
        cause="missing-weights",
        title="{value} quantised weights are stored without their scales: {parameters}",
        reason="What is stored of a quantised weight is a code, and its scale gives it a size. Without one a load takes the codes "
        "for values, or draws the scale at random, and says nothing: weights come out hundreds of times too large.",
        remedies=("reload-weights",),
    ),
    Budget(
        check="load.complete",
        measurement="lost-head",
        limit=0,
        cause="lost-head",
        title="the adapter was trained for a classifier and saved without its head: {parameters}",
        reason="Neither the adapter nor its base holds the head, so each load draws another one at random, and the "
        "predictions are random. peft saves a head with the adapter only where modules_to_save names it.",
        remedies=("save-head",),
    ),
    Budget(
        check="load.complete",
        measurement="renamed",
        limit=0,
        cause="missing-weights",
        title="{value} weights are stored under other names ({facts[stored as]} for {facts[looked for as]}): "
        "the model runs on initial values",
        reason="The files hold tensors of these shapes whose names end alike or have parts added, so the checkpoint was "
        "saved with another layout or by a wrapper. transformers warns and continues with random weights, and the "
        "outputs are noise.",
        remedies=("newer-version", "pin-version", "reload-weights"),
    ),
    Budget(
        check="load.complete",
        measurement="missing",
        limit=0,
        cause="missing-weights",
        title="weights of the model that the checkpoint lacks: {parameters}",
        reason="They hold whatever initialisation gave them. Only a new head may be absent from the files.",
        remedies=("reload-weights", "newer-version"),
    ),
    Budget(
        check="load.complete",
        measurement="unexpected",
        limit=0,
        cause="lost-weights",
        title="stored tensors that found no place in the model: {parameters}",
        reason="The file holds trained values that the model does not use; names or layout changed between the "
        "version that saved and the one that loads.",
        remedies=("newer-version", "pin-version"),
    ),
    Budget(
        check="load.complete",
        measurement="mismatched",
        limit=0,
        cause="lost-weights",
        title="stored tensors of another shape than the model's: {parameters}",
        reason="Shapes in the file and in the model built from config.json differ, so these weights were not loaded.",
        remedies=("fix-config", "reload-weights"),
    ),
    Budget(
        check="load.complete",
        measurement="changed",
        limit=0,
        cause="lost-weights",
        title="weights that differ from the stored ones after loading: {parameters}",
        reason="Loading must give the stored value cast to the asked dtype, and it gave another: the weight went to "
        "another tensor, or was initialised again after it was loaded.",
        remedies=("newer-version", "pin-version"),
    ),
    Budget(
        check="load.finite",
        measurement="non-finite",
        limit=0,
        cause="corrupt-weights",
        title="NaN or infinite weights after loading ({value} elements): {parameters}",
        reason="A weight that is not finite makes every output that depends on it NaN. Stored so, the file is "
        "damaged; finite in the file, it does not fit the range of the precision (float16 ends at 65,504).",
        remedies=("reload-weights", "use-amp-bf16"),
    ),
    Budget(
        check="load.finite",
        measurement="uninitialised-buffers",
        limit=0,
        cause="uninitialised-buffer",
        title="uninitialised buffers: {parameters}",
        reason="They are in no file, and the load gave them memory without writing to it: filled with NaN beforehand it stays NaN, "
        "filled with zeros it stays zero. In an ordinary run they hold whatever the allocator had there. transformers 5.x builds on "
        "the meta device and leaves to _init_weights what a constructor computed (transformers#48892).",
        remedies=("newer-version",),
    ),
    Budget(
        check="load.dtype",
        measurement="ignored-dtype",
        limit=0,
        cause="ignored-dtype",
        title="{facts[asked]} was requested, and the model is in {facts[holds]}",
        reason="No weight has the dtype that was asked for, so the load did not heed it: the model's own code casts, or builds in "
        "the dtype that config.json names. Its range and its rounding are those of another precision than the one that was meant.",
        remedies=("cast-after-loading", "fix-config"),
    ),
    Budget(
        check="load.dtype",
        measurement="other-dtype",
        limit=0,
        cause="low-precision-section",
        title="parameters that are not in the requested dtype: {parameters}",
        reason="These parameters ignore the dtype that was asked for and are not declared to be kept in float32. A "
        "head in float16 under a body in another dtype overflows at 65,504 or refuses its input.",
        remedies=("cast-after-loading", "newer-version"),
    ),
    Budget(
        check="load.dtype",
        measurement="rounded-buffers",
        limit=0,
        cause="rounded-buffer",
        title="buffers that the class keeps in float32 were rounded: {parameters}",
        reason="The class names the dtype of these buffers itself, so a load with a dtype leaves them as they are; model.to(dtype) "
        "rounds them, and a model saved after it stores them so. Rotary frequencies in bfloat16 turn by a wrong angle that grows "
        "with the position, and a router's bias no longer tells its experts apart.",
        remedies=("load-with-dtype",),
    ),
    Budget(
        check="load.head-init",
        measurement="uninitialised",
        limit=0,
        cause="uninitialised-parameters",
        title="never initialised: {parameters}",
        reason="This memory was never written: with uninitialised memory filled with NaN the weights come out NaN. In an "
        "ordinary run they hold whatever the allocator had there, which may be zeros today and NaN tomorrow.",
        remedies=("init-head", "newer-version"),
    ),
    Budget(
        check="load.head-init",
        measurement="gain",
        limit=LARGEST_GAIN,
        cause="bad-initialisation",
        title="new weight {parameters} is initialised at {value:.3g} times the scale that keeps variance",
        reason="A weight's gain is its root mean square times the square root of its fan-in: 0.58 to 1.41 for the "
        "standard initialisers. Ten times the largest of them (14.1) saturates the softmax: the first losses and "
        "gradients are huge and training starts from noise.",
        remedies=("init-head", "clip-grad-norm"),
    ),
    Budget(
        check="load.roundtrip",
        measurement="differing",
        limit=0,
        cause="lost-weights",
        title="saving and loading again changes: {parameters}",
        reason="save_pretrained followed by from_pretrained must give the same bits, the same config and, in true fp64, the "
        "same answers; what differs is lost or changed at a checkpoint of a training run.",
        remedies=("newer-version", "pin-version"),
    ),
    Budget(
        check="load.roundtrip",
        measurement="other-dtype",
        limit=0,
        cause="low-precision-section",
        title="in another dtype after saving and loading: {parameters}",
        reason="The class holds these in a dtype of its own, whatever was requested. A new head is made in the requested dtype, "
        "so this shows only when the trained model is opened: a float16 head under a body in another dtype refuses its input.",
        remedies=("cast-after-loading", "newer-version"),
    ),
    Budget(
        check="load.tied",
        measurement="stored-apart",
        limit=0,
        cause="untied-weights",
        title="config.json ties the embeddings, and the files hold two different ones",
        reason="With tie_word_embeddings one tensor is both embeddings, and the files hold an output embedding of its own, as a merged "
        "LoRA on it leaves one. Releases before 5.0 drop it without a word, so the answers are not those of the model that was saved.",
        remedies=("fix-config",),
    ),
    Budget(
        check="load.tied",
        measurement="wrongly-tied",
        limit=0,
        cause="untied-weights",
        title="input and output embeddings are not tied as the config says",
        reason="tie_word_embeddings decides whether both embeddings are one tensor. Untied on load, the output "
        "embedding is not what was trained, and both drift apart in training; tied without being declared, one of "
        "two trained tensors was dropped.",
        remedies=("fix-config", "newer-version"),
    ),
)
