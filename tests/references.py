"""Slow literal twins of the fast paths: straight from METHOD, one loop per index, nothing clever."""

import torch

# ------------------------------------------------------------------------------------------------------- alignment
# One image, one caption: regions [R, d] and tokens [W, d], padding already cut away. Gradients are autograd's.


def cosine(a, b):
    """Cosine as torch.nn.functional.cosine_similarity defines it: each norm is at least 1e-8."""
    return a @ b / (torch.linalg.vector_norm(a).clamp_min(1e-8) * torch.linalg.vector_norm(b).clamp_min(1e-8))


def hybrid_weights(queries, sources, temperature):
    """METHOD section 2: the attention w [n_q, n_s]."""
    a = torch.stack([torch.stack([torch.nn.functional.leaky_relu(s @ q, 0.1) for s in sources]) for q in queries])
    b = torch.stack([a[:, s] / (torch.linalg.vector_norm(a[:, s]) + 1e-8) for s in range(len(sources))], dim=1)
    return torch.stack([torch.softmax(temperature * row, dim=0) for row in b])


def hybrid_focal(weights, focal_type):
    """METHOD section 2: one query's weights [n_s] after the Key Semantic Filter; where nothing is kept, all is."""
    count = len(weights)
    if focal_type == "equal":
        keep = [bool(w > 1 / count) for w in weights]
    else:
        keep = [bool(sum((w - other) * other.sqrt() for other in weights) > 0) for w in weights.detach()]
    uniform = bool((weights.detach() - weights.detach().mean()).abs().max() <= 1e-12)  # rounding decides nothing
    if uniform or not any(keep):
        keep = [True] * count
    kept = torch.stack([w if k else torch.zeros_like(w) for w, k in zip(weights, keep, strict=True)])
    return kept / kept.sum()


def hybrid_score(queries, sources, temperature, focal_type=None):
    """METHOD section 2: score(Q, S), with focal weights where a focal type is given."""
    weights = hybrid_weights(queries, sources, temperature)
    cosines = []
    for q, row in zip(queries, weights, strict=True):
        if focal_type is not None:
            row = hybrid_focal(row, focal_type)
        u = sum(w * s for w, s in zip(row, sources, strict=True))
        cosines.append(cosine(q, u))
    return torch.stack(cosines).mean()


def hybrid_fine(image, text, direction, temperature, focal_type, streams=("ksf", "lrg_high", "lrg_mid")):
    """METHOD section 2: fine(i, j). image = (high, mid), text = (high, mid)."""
    if direction == "both":
        both = [hybrid_fine(image, text, way, temperature, focal_type, streams) for way in ("i2t", "t2i")]
        return (both[0] + both[1]) / 2
    levels = {"ksf": (0, 0, focal_type), "lrg_high": (0, 1, None), "lrg_mid": (1, 0, None)}
    total = image[0].new_zeros(())
    for stream in streams:
        of_image, of_text, focal = levels[stream]
        pair = (image[of_image], text[of_text])
        if len(pair[1]):  # a caption without a valid token scores 0
            total = total + hybrid_score(*(pair if direction == "i2t" else pair[::-1]), temperature, focal)
    return total


def revised_tokens(tokens):
    """METHOD section 3: [CLS] and [SEP] are dropped when there are more than 2 tokens."""
    return tokens[1:-1] if len(tokens) > 2 else tokens


def revised_lrg(regions, tokens, gates=True):
    """METHOD section 3: Local Relationship Guidance with its gates, which cancel; `gates=False`: the short form."""
    mean = regions.mean(0)
    gated_words = [torch.sigmoid(t @ mean) * t if gates else t for t in tokens]
    gated_regions = []
    for v in regions:
        best = max(range(len(tokens)), key=lambda k: float(cosine(v, gated_words[k])))
        gated_regions.append(torch.sigmoid(v @ gated_words[best]) * v if gates else v)
    scores = []
    for t in gated_words:
        p = torch.stack([cosine(v, t) for v in gated_regions])
        scores.append((torch.softmax(p, dim=0) * p).sum())
    return torch.stack(scores).mean()


def residuals(sources):
    """s - mean(S), with the mean taken of the differences to the first: exactly zero where all sources are equal."""
    shifted = sources - sources[0]
    return shifted - shifted.mean(0)


def revised_ksf(queries, sources):
    """METHOD section 3: the Key Semantic Filter of residual sources."""
    r = torch.stack([torch.stack([cosine(q, s) for s in sources]) for q in queries])
    delta = ((r - r.mean(1, keepdim=True)) + (r - r.mean(0, keepdim=True))) / 2
    rest = residuals(sources)
    best = []
    for i, q in enumerate(queries):
        z = []
        for j in range(len(sources)):
            sign = 0.0 if abs(float(delta[i, j])) <= 1e-8 else float(delta[i, j].sign())
            z.append(cosine(q, rest[j]) * sign)
        best.append(torch.stack(z).max())
    return torch.stack(best).mean()


def revised_fine(image, text, direction, streams=("ksf", "lrg_high", "lrg_mid"), gates=True):
    """METHOD section 3: fine(i, j). image = (high, mid), text = (high, mid), [CLS] and [SEP] still there."""
    if direction == "both":
        both = [revised_fine(image, text, way, streams, gates) for way in ("i2t", "t2i")]
        return (both[0] + both[1]) / 2
    high, mid = (revised_tokens(tokens) for tokens in text)
    total = image[0].new_zeros(())
    if not len(high):  # a caption without a valid token scores 0
        return total
    if "ksf" in streams:
        total = total + revised_ksf(*((image[0], high) if direction == "i2t" else (high, image[0])))
    if "lrg_high" in streams:
        total = total + revised_lrg(image[0], mid, gates)
    if "lrg_mid" in streams:
        total = total + revised_lrg(image[1], high, gates)
    return total


def all_pairs(fine, images, texts, **arguments):
    """The score matrix [N, M] of a twin `fine`: a loop over images and captions, padding cut away by the mask."""
    rows = []
    for i in range(len(images.high)):
        image = (images.high[i], images.mid[i])
        row = []
        for j in range(len(texts.high)):
            valid = texts.mask[j]
            row.append(fine(image, (texts.high[j][valid], texts.mid[j][valid]), **arguments))
        rows.append(torch.stack(row))
    return torch.stack(rows)
