"""Kernels of `seqloss.loss.triton_head`.

Every class but the label is folded into four numbers per token: the largest logit m, the sum s of
`exp(z - m)`, the sum t of `exp(z - m) * (z - m)`, and how many logits are above the label's. All
terms of a sum have the same sign, so that nothing cancels.

Names in capitals are known when a kernel is compiled.
"""

# No annotations but these: Triton compiles them too, and they have to be objects.
import triton
import triton.language as tl

# As `seqloss.loss.head.ABSENT`; kernels read no other globals.
_ABSENT = tl.constexpr(-1e30)


# Else Triton compiles variants for counts of 1 and of multiples of 16, and for labels that begin
# elsewhere within what was copied to the device, in the middle of serving.
@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["labels"])
def fold_classes(
    states,
    weight,
    bias,
    labels,
    label_logits,
    partials,
    num_tokens,
    num_classes,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    CLASSES: tl.constexpr,
    INNER: tl.constexpr,
    TILES: tl.constexpr,
    ALL_TERMS: tl.constexpr,
    UPCASTS: tl.constexpr,
):
    """Folds some tiles of classes into numbers of each token of a tile.

    Program (i, j) has TOKENS tokens from i * TOKENS on, and TILES tiles of CLASSES classes.
    Programs of one j stand together, so that they find its weights in the cache.

    Args:
        states: Shape: (num_tokens, WIDTH).
        weight: of the states' dtype. Shape: (num_classes, WIDTH).
        bias: float32; `ABSENT` for classes that are not in the softmax. Shape: (num_classes,).
        labels: int64. Shape: (num_tokens,).
        label_logits: float32. Shape: (num_tokens,).
        partials: m and s, and t and the counts where they are wanted, of each j; float32.
            Shape: (splits, 2 or 4, num_tokens).
        num_tokens: how many.
        num_classes: how many.
        WIDTH: of a state.
        TOKENS: of a tile.
        CLASSES: of a tile.
        INNER: of a tile: what is multiplied at a time of a state.
        TILES: of classes that a program has.
        ALL_TERMS: whether t and the counts are wanted.
        UPCASTS: whether to multiply in float32, as the interpreter has to.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    is_token = token < num_tokens
    split = tl.program_id(1)
    label = tl.load(labels + token, mask=is_token, other=0)
    label_logit = tl.load(label_logits + token, mask=is_token, other=0.0)
    largest = tl.full((TOKENS,), _ABSENT, tl.float32)
    total = tl.zeros((TOKENS,), tl.float32)
    weighted = tl.zeros((TOKENS,), tl.float32)
    ahead = tl.zeros((TOKENS,), tl.float32)
    state_rows = states + token.to(tl.int64)[:, None] * WIDTH
    for tile in range(TILES):
        column = (split * TILES + tile) * CLASSES + tl.arange(0, CLASSES)
        is_class = column < num_classes
        weight_columns = weight + column.to(tl.int64)[None, :] * WIDTH
        logits = tl.zeros((TOKENS, CLASSES), tl.float32)
        for start in range(0, WIDTH, INNER):
            inner = start + tl.arange(0, INNER)
            is_inner = inner < WIDTH
            left = tl.load(
                state_rows + inner[None, :], mask=is_token[:, None] & is_inner[None, :], other=0.0
            )
            right = tl.load(
                weight_columns + inner[:, None],
                mask=is_class[None, :] & is_inner[:, None],
                other=0.0,
            )
            if UPCASTS:
                left, right = left.to(tl.float32), right.to(tl.float32)
            logits = tl.dot(left, right, logits, input_precision="ieee")
        logits += tl.load(bias + column, mask=is_class, other=_ABSENT)[None, :]
        logits = tl.where(column[None, :] == label[:, None], _ABSENT, logits)

        higher = tl.maximum(largest, tl.max(logits, 1))
        shift = largest - higher
        shrinks = tl.exp(shift)
        distance = logits - higher[:, None]
        exp = tl.exp(distance)
        if ALL_TERMS:
            weighted = shrinks * (weighted + shift * total) + tl.sum(exp * distance, 1)
            ahead += tl.sum((logits > label_logit[:, None]).to(tl.float32), 1)
        total = total * shrinks + tl.sum(exp, 1)
        largest = higher

    NUMBERS: tl.constexpr = 4 if ALL_TERMS else 2
    at = partials + split * NUMBERS * num_tokens + token
    tl.store(at, largest, mask=is_token)
    tl.store(at + num_tokens, total, mask=is_token)
    if ALL_TERMS:
        tl.store(at + 2 * num_tokens, weighted, mask=is_token)
        tl.store(at + 3 * num_tokens, ahead, mask=is_token)


@triton.jit(do_not_specialize=["num_tokens"])
def finish_terms(
    partials,
    label_logits,
    mean_logits,
    terms,
    ranks,
    num_tokens,
    num_splits,
    TOKENS: tl.constexpr,
    ALL_TERMS: tl.constexpr,
):
    """Folds what `fold_classes` left over of all classes into a token's terms.

    Args:
        partials: see there.
        label_logits: float32. Shape: (num_tokens,).
        mean_logits: over all classes of the softmax, float32. Shape: (num_tokens,).
        terms: target_logprob, mean_logprob and, where all are wanted, entropy are written here,
            float32. Shape: (2 or 3, num_tokens).
        ranks: and here, where they are wanted, int32. Shape: (num_tokens,).
        num_tokens: how many.
        num_splits: how many parts all classes were cut into.
        TOKENS: of a program.
        ALL_TERMS: whether ranks and entropies are wanted.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    is_token = token < num_tokens
    largest = tl.full((TOKENS,), _ABSENT, tl.float32)
    total = tl.zeros((TOKENS,), tl.float32)
    weighted = tl.zeros((TOKENS,), tl.float32)
    ahead = tl.zeros((TOKENS,), tl.int32)
    NUMBERS: tl.constexpr = 4 if ALL_TERMS else 2
    for split in range(num_splits):
        at = partials + split * NUMBERS * num_tokens + token
        part_largest = tl.load(at, mask=is_token, other=_ABSENT)
        part_total = tl.load(at + num_tokens, mask=is_token, other=1.0)
        higher = tl.maximum(largest, part_largest)
        shift, part_shift = largest - higher, part_largest - higher
        shrinks, part_shrinks = tl.exp(shift), tl.exp(part_shift)
        if ALL_TERMS:
            part_weighted = tl.load(at + 2 * num_tokens, mask=is_token, other=0.0)
            weighted = shrinks * (weighted + shift * total) + part_shrinks * (
                part_weighted + part_shift * part_total
            )
            # Of a split's classes a float32 counts each one exactly; of all, an int32 does.
            ahead += tl.load(at + 3 * num_tokens, mask=is_token, other=0.0).to(tl.int32)
        total = total * shrinks + part_total * part_shrinks
        largest = higher

    label_logit = tl.load(label_logits + token, mask=is_token, other=0.0)
    mean_logit = tl.load(mean_logits + token, mask=is_token, other=0.0)
    lead = largest + tl.log(total) - label_logit
    nll = _softplus(lead)
    tl.store(terms + token, -nll, mask=is_token)
    tl.store(terms + num_tokens + token, mean_logit - (label_logit + nll), mask=is_token)
    if ALL_TERMS:
        nll_other = _softplus(-lead)
        entropy_other = tl.log(total) - weighted / total
        entropy = tl.exp(-nll) * nll + tl.exp(-nll_other) * (nll_other + entropy_other)
        tl.store(terms + 2 * num_tokens + token, entropy, mask=is_token)
        tl.store(ranks + token, ahead, mask=is_token)


@triton.jit
def _softplus(values):
    """`log(1 + exp(values))`, to the last digits where that is close to 0 too.

    With u = 1 + e, rounded, log(u) * e / (u - 1) makes up for what the rounding lost of e (Kahan).
    """
    exp = tl.exp(-tl.abs(values))
    rounded = 1.0 + exp
    is_lost = rounded == 1.0
    log1p = tl.where(is_lost, exp, tl.log(rounded) * (exp / tl.where(is_lost, 1.0, rounded - 1.0)))
    return tl.maximum(values, 0.0) + log1p
