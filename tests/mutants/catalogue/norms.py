"""Mistakes in RMSNorm."""

from __future__ import annotations

from mutants.catalogue.record import ORACLE, Mutant
from mutants.editing import edited, on

GLM, CHATGLM = "model.layers.1.input_layernorm", "transformer.encoder.layers.1.post_attention_layernorm"
GLM_NAME, CHATGLM_NAME = GLM.replace(".", r"\."), CHATGLM.replace(".", r"\.")
TO_FP32 = "hidden_states = hidden_states.to(torch.float32)"

MUTANTS = (
    Mutant(
        id="norm-eps-of-another-model",
        family="glm",
        apply=on(GLM, lambda norm: setattr(norm, "variance_epsilon", 1e-6)),
        expected_checks=(ORACLE,),
        module_pattern=GLM_NAME,
        why="eps 1e-6, the class's default, where config.json says 1.5625e-07",
    ),
    Mutant(
        id="norm-eps-last",
        family="glm4",
        apply=on("model.norm", lambda norm: setattr(norm, "variance_epsilon", 1e-6)),
        expected_checks=(ORACLE,),
        module_pattern=r"model\.norm",
        why="eps 1e-6 in the last norm where config.json says 1e-05",
    ),
    Mutant(
        id="norm-eps-chatglm",
        family="chatglm",
        apply=on(CHATGLM, lambda norm: setattr(norm, "eps", 1e-5)),
        expected_checks=(ORACLE,),
        module_pattern=CHATGLM_NAME,
        why="eps 1e-5, torch's default for LayerNorm",
    ),
    Mutant(
        id="norm-eps-outside-root",
        family="glm",
        apply=edited(
            GLM,
            "forward",
            "torch.rsqrt(variance + self.variance_epsilon)",
            "(1.0 / (torch.sqrt(variance) + self.variance_epsilon))",
        ),
        expected_checks=(ORACLE,),
        module_pattern=GLM_NAME,
        why="eps added to the root instead of under it",
    ),
    Mutant(
        id="norm-without-fp32-bf16",
        kind="worse",
        family="glm4",
        precision="bf16",
        apply=edited(GLM, "forward", TO_FP32, "pass"),
        expected_checks=("reference.local",),
        module_pattern=GLM_NAME,
        why="the float32 section is gone: squares and mean are rounded to 8 bits",
    ),
    Mutant(
        id="norm-without-fp32-fp16",
        kind="worse",
        family="chatglm",
        precision="fp16",
        apply=edited(CHATGLM, "forward", "hidden_states = hidden_states.float()", "pass"),
        expected_checks=("reference.local",),
        module_pattern=CHATGLM_NAME,
        why="the float32 section is gone in float16",
    ),
    Mutant(
        id="norm-statistic-in-bf16",
        kind="worse",
        family="glm",
        apply=edited(GLM, "forward", ".mean(-1, keepdim=True)", ".mean(-1, keepdim=True).bfloat16().float()"),
        expected_checks=("reference.local",),
        module_pattern=GLM_NAME,
        why="the mean square is kept in bfloat16 in an fp32 model",
    ),
    Mutant(
        id="norm-centred",
        family="glm",
        apply=edited(
            GLM,
            "forward",
            "hidden_states.pow(2).mean(-1, keepdim=True)",
            "hidden_states.var(-1, keepdim=True, unbiased=False)",
        ),
        expected_checks=(ORACLE,),
        module_pattern=GLM_NAME,
        why="LayerNorm's variance instead of the mean square",
    ),
    Mutant(
        id="norm-gain-plus-one",
        family="glm4",
        apply=edited(
            "model.layers.2.post_mlp_layernorm", "forward", "return self.weight *", "return (1 + self.weight) *"
        ),
        expected_checks=(ORACLE,),
        module_pattern=r"model\.layers\.2\.post_mlp_layernorm",
        why="Gemma's gain of 1 + weight",
    ),
    Mutant(
        id="norm-gain-missing",
        family="chatglm",
        apply=edited(CHATGLM, "forward", "return self.weight *", "return 1.0 *"),
        expected_checks=("train.grad-flow", ORACLE),
        module_pattern=CHATGLM_NAME,
        why="the gain is never applied",
    ),
    Mutant(
        id="norm-sum-for-mean",
        family="glm",
        apply=edited(GLM, "forward", ".mean(-1, keepdim=True)", ".sum(-1, keepdim=True)"),
        expected_checks=(ORACLE,),
        module_pattern=GLM_NAME,
        why="L2 norm instead of root mean square",
    ),
    Mutant(
        id="norm-over-sequence",
        family="glm4",
        apply=edited(GLM, "forward", ".mean(-1, keepdim=True)", ".mean((-2, -1), keepdim=True)"),
        expected_checks=("forward.causal", "forward.padding", ORACLE),
        module_pattern=GLM_NAME,
        why="the statistic runs over the sequence too, so the future and padding enter it",
    ),
    Mutant(
        id="norm-over-batch",
        family="chatglm",
        apply=edited(CHATGLM, "forward", ".mean(-1, keepdim=True)", ".mean((0, -1), keepdim=True)"),
        expected_checks=("forward.batch", ORACLE),
        module_pattern=CHATGLM_NAME,
        why="the statistic runs over the batch too",
    ),
    Mutant(
        id="norm-gain-before-cast",
        family="glm",
        precision="bf16",
        apply=edited(
            GLM,
            "forward",
            "return self.weight * hidden_states.to(input_dtype)",
            "return (self.weight * hidden_states).to(input_dtype)",
        ),
        expected_checks=(),
        equivalent=True,
        why="the gain multiplies in float32 and one rounding fewer is made: the same function, a little more exact",
    ),
)
