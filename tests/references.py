"""Slow literal twins of the fast paths: straight from METHOD, one loop per index, nothing clever."""

import math

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
    """METHOD section 2: one query's weights [n_s] after the Key Semantic Filter; where nothing is kept, all is.

    What is at the bar within 8 rounding errors is kept, so that rounding does not decide between equal weights.
    """
    count = len(weights)
    known = weights.detach() * (1 + 8 * torch.finfo(weights.dtype).eps)
    if focal_type == "equal":
        keep = [bool(w > 1 / count) for w in known]
    else:
        keep = [bool(sum((w - other) * other.sqrt() for other in weights.detach()) > 0) for w in known]
    if not any(keep):
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
        best = max(range(len(tokens)), key=lambda k: cosine(v, gated_words[k]).item())
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
            sign = 0.0 if abs(delta[i, j].item()) <= 1e-8 else delta[i, j].sign().item()
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


def by_caption(name, images, texts, direction, temperature=9.0, focal_type="prob"):
    """The score matrix [N, M] as the public code goes about it: a loop over captions, all images at once.

    The formulas of METHOD sections 2 and 3 as they are written: attended vectors are formed, the focal test is
    quadratic, gates are computed.
    """
    columns = []
    for j in range(len(texts.high)):
        high, mid = (tokens[j][texts.mask[j]] for tokens in (texts.high, texts.mid))
        if not len(high):
            columns.append(images.high.new_zeros(len(images.high)))
            continue
        if name == "revised":
            high, mid = revised_tokens(high), revised_tokens(mid)
        ways = ("i2t", "t2i") if direction == "both" else (direction,)
        scores = []
        for way in ways:
            total = 0
            for regions, tokens, focal in (
                (images.high, high, True),
                (images.high, mid, False),
                (images.mid, high, False),
            ):
                tokens = tokens.expand(len(regions), -1, -1)
                queries, sources = (regions, tokens) if way == "i2t" else (tokens, regions)
                if name == "hybrid":
                    total = total + _batched_hybrid(queries, sources, temperature, focal_type if focal else None)
                else:
                    total = total + (_batched_ksf(queries, sources) if focal else _batched_lrg(regions, tokens))
            scores.append(total)
        columns.append(sum(scores) / len(scores))
    return torch.stack(columns, dim=1)


def _batched_hybrid(queries, sources, temperature, focal_type):
    """METHOD section 2 for N pairs: queries [N, n_q, d], sources [N, n_s, d] -> [N]."""
    a = torch.nn.functional.leaky_relu(sources @ queries.mT, 0.1)  # [N, n_s, n_q]
    b = a / (torch.linalg.vector_norm(a, dim=2, keepdim=True) + 1e-8)
    w = torch.softmax(temperature * b.mT, dim=2)  # [N, n_q, n_s]
    if focal_type is not None:
        known = w.detach() * (1 + 8 * torch.finfo(w.dtype).eps)
        if focal_type == "equal":
            keep = known > 1 / w.shape[2]
        else:
            difference = known[..., :, None] - w.detach()[..., None, :]
            keep = (difference * w.detach().sqrt()[..., None, :]).sum(-1) > 0
        w = torch.where(keep | ~keep.any(2, keepdim=True), w, 0)
        w = w / w.sum(2, keepdim=True)
    return torch.nn.functional.cosine_similarity(queries, w @ sources, dim=2).mean(1)


def _cosines(first, second):
    """Cosine of each x [N, n, d] with each y [N, m, d]: [N, n, m]."""
    first, second = (x / torch.linalg.vector_norm(x, dim=2, keepdim=True).clamp_min(1e-8) for x in (first, second))
    return first @ second.mT


def _batched_lrg(regions, tokens):
    """METHOD section 3 for N pairs: Local Relationship Guidance with its gates, [N]."""
    words = torch.sigmoid(tokens @ regions.mean(1, keepdim=True).mT) * tokens
    best = _cosines(regions, words).argmax(2)
    chosen = torch.take_along_dim(words, best[..., None], dim=1)
    gated = torch.sigmoid((regions * chosen).sum(2, keepdim=True)) * regions
    p = _cosines(words, gated)
    return (torch.softmax(p, dim=2) * p).sum(2).mean(1)


def _batched_ksf(queries, sources):
    """METHOD section 3 for N pairs: the Key Semantic Filter, [N]."""
    r = _cosines(queries, sources)
    delta = ((r - r.mean(2, keepdim=True)) + (r - r.mean(1, keepdim=True))) / 2
    rest = sources - sources[:, :1]
    z = _cosines(queries, rest - rest.mean(1, keepdim=True)) * delta.sign() * (delta.abs() > 1e-8)
    return z.amax(2).mean(1)


def all_pairs(fine, images, texts, **arguments):
    """The score matrix [N, M] of a reference `fine`: a loop over images and captions without padding."""
    rows = []
    for i in range(len(images.high)):
        image = (images.high[i], images.mid[i])
        row = []
        for j in range(len(texts.high)):
            valid = texts.mask[j]
            row.append(fine(image, (texts.high[j][valid], texts.mid[j][valid]), **arguments))
        rows.append(torch.stack(row))
    return torch.stack(rows)


# ----------------------------------------------------------------------------------------------------------- losses
# Plain Python loops over pairs, as METHOD section 4 writes them. s(a, b) is the dot product.


def loop_hard_negatives(scores, image_ids):
    """(text of image, image of text), -1 where there is no negative; the first one on ties."""
    count = len(scores)
    text_of_image, image_of_text = [], []
    for i in range(count):
        others = [j for j in range(count) if image_ids[j] != image_ids[i]]
        text_of_image.append(max(others, key=lambda j, i=i: scores[i][j]) if others else -1)
        image_of_text.append(max(others, key=lambda j, i=i: scores[j][i]) if others else -1)
    return text_of_image, image_of_text


def loop_triplet(scores, text_of_image, image_of_text, margin):
    """The sum over the batch."""
    total = 0.0
    for i in range(len(scores)):
        if text_of_image[i] >= 0:
            total += max(0.0, margin + scores[i][text_of_image[i]] - scores[i][i])
        if image_of_text[i] >= 0:
            total += max(0.0, margin + scores[image_of_text[i]][i] - scores[i][i])
    return total


def loop_triplet_all(scores, image_ids, margin):
    total = 0.0
    for i in range(len(scores)):
        for j in range(len(scores)):
            if image_ids[i] != image_ids[j]:
                total += max(0.0, margin + scores[i][j] - scores[i][i])
                total += max(0.0, margin + scores[i][j] - scores[j][j])
    return total


def loop_global_loss(name, images, texts, text_of_image, image_of_text, margin):
    """GCD, GCD_revised, F_HN, M_HN of lists of vectors."""
    name = name.removesuffix("_release")

    def s(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True))

    count = len(images)
    means, mixed = 0.0, []
    for i in range(count):
        positive = s(images[i], texts[i])
        t, v = text_of_image[i], image_of_text[i]

        def hinge(value, positive=positive):
            return max(0.0, margin + value - positive)

        if t >= 0:
            means += hinge(s(images[i], texts[t]))
            if name in ("F_HN", "GCD"):
                means += hinge(s(texts[t], texts[i]))
            if name == "GCD":
                means += max(0.0, abs(s(images[i], images[t]) - s(texts[i], texts[t])) - 0.2)
            if name == "GCD_revised":
                means += hinge(s(texts[i], texts[t])) + abs(s(images[i], images[t]) - s(texts[i], texts[t]))
        if v >= 0:
            means += hinge(s(images[v], texts[i]))
            if name in ("F_HN", "GCD"):
                means += hinge(s(images[v], images[i]))
            if name == "GCD":
                means += max(0.0, abs(s(images[i], images[v]) - s(texts[i], texts[v])) - 0.2)
            if name == "GCD_revised":
                means += hinge(s(images[i], images[v])) + abs(s(images[i], images[v]) - s(texts[i], texts[v]))
        if t >= 0 and v >= 0:
            if name in ("F_HN", "GCD") and t == v:
                means += hinge(s(images[v], texts[t]))
            if name == "GCD_revised" and t != v:
                mixed.append(hinge(s(images[v], texts[t])))
    return means / count + (sum(mixed) / len(mixed) if mixed else 0.0)


def loop_info_nce(images, texts, image_ids, temperature):
    count, total = len(images), 0.0
    for i in range(count):
        kept = [j for j in range(count) if j == i or image_ids[j] != image_ids[i]]
        for a, b in ((images, texts), (texts, images)):
            logits = [sum(x * y for x, y in zip(a[i], b[j], strict=True)) / temperature for j in kept]
            highest = max(logits)
            total += highest + math.log(sum(math.exp(value - highest) for value in logits))
            total -= sum(x * y for x, y in zip(a[i], b[i], strict=True)) / temperature
    return total / (2 * count)


# -------------------------------------------------------------------------------------------------------- retrieval
# Lists of lists, scores[query][item]; correct(query, item) says what is right.


def loop_rank(order, correct):
    """Rank of the first correct item of an ordered list of items, inf where there is none."""
    return next((float(rank) for rank, item in enumerate(order) if correct(item)), math.inf)


def loop_hierarchical(coarse, fine, image_of_text, top_k):
    """((ranks, lists) image to text, (ranks, lists) text to image) by sorting; wrong items first among equals."""
    images, texts = len(coarse), len(image_of_text)
    both = []
    for queries, items, turned in ((images, texts, False), (texts, images, True)):
        ranks, lists = [], []
        for q in range(queries):
            rough = [coarse[g][q] if turned else coarse[q][g] for g in range(items)]
            exact = [fine[g][q] if turned else fine[q][g] for g in range(items)]
            right = [image_of_text[q] == g if turned else image_of_text[g] == q for g in range(items)]
            shortlist = sorted(range(items), key=lambda g: (-rough[g], right[g], g))[:top_k]
            shortlist.sort(key=lambda g: (-exact[g], right[g]))
            ranks.append(loop_rank(shortlist, right.__getitem__))
            lists.append(shortlist)
        both.append((ranks, lists))
    return both


def loop_bootstrap(ranks, k, resamples, generator):
    """Recalls at k of resampled queries, one query at a time."""
    found = []
    for _ in range(resamples):
        hits = [ranks[generator.integers(len(ranks))] < k for _ in ranks]
        found.append(100.0 * sum(hits) / len(ranks))
    return found


# -------------------------------------------------------------------------------------------------------- backbones
# A ConvNeXt with the parameter names of its first public files (`downsample_layers.0.0.weight`, `stages.2.26.dwconv`,
# `.norm`, `.pwconv1`, `.pwconv2`, `.gamma`, `norm`, `head`), computed tensor by tensor from the paper's description.


def original_convnext_state(depths, dims, classes):
    """Random weights in the original naming."""
    shapes = {"downsample_layers.0.0": (dims[0], 3, 4, 4), "downsample_layers.0.1": (dims[0],)}
    for i in range(1, 4):
        shapes[f"downsample_layers.{i}.0"] = (dims[i - 1],)
        shapes[f"downsample_layers.{i}.1"] = (dims[i], dims[i - 1], 2, 2)
    for i, (depth, width) in enumerate(zip(depths, dims, strict=True)):
        for j in range(depth):
            shapes |= {f"stages.{i}.{j}.dwconv": (width, 1, 7, 7), f"stages.{i}.{j}.norm": (width,)}
            shapes |= {f"stages.{i}.{j}.pwconv1": (4 * width, width), f"stages.{i}.{j}.pwconv2": (width, 4 * width)}
    shapes |= {"norm": (dims[3],), "head": (classes, dims[3])}
    state = {f"stages.{i}.{j}.gamma": torch.rand(w) for i, w in enumerate(dims) for j in range(depths[i])}
    for name, shape in shapes.items():
        state[f"{name}.weight"] = torch.randn(shape) / max(1, torch.Size(shape[1:]).numel()) ** 0.5
        state[f"{name}.bias"] = torch.randn(shape[0]) / 10
    return state


def original_convnext(state, pixels, depths):
    """The third and the fourth stage's output [N, C, h, w], and the normalised mean of the fourth [N, C]."""

    def norm(x, name):  # over the channels of [N, C, h, w] or [N, C]
        centred = x - x.mean(dim=1, keepdim=True)
        scaled = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
        shape = (1, -1, 1, 1)[: x.ndim]
        return scaled * state[f"{name}.weight"].view(shape) + state[f"{name}.bias"].view(shape)

    def conv(x, name, **arguments):
        return torch.nn.functional.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **arguments)

    def linear(x, name):  # at each position
        return torch.einsum("nchw,oc->nohw", x, state[f"{name}.weight"]) + state[f"{name}.bias"].view(1, -1, 1, 1)

    x, outputs = pixels, []
    for i, depth in enumerate(depths):
        if i == 0:
            x = norm(conv(x, "downsample_layers.0.0", stride=4), "downsample_layers.0.1")
        else:
            x = conv(norm(x, f"downsample_layers.{i}.0"), f"downsample_layers.{i}.1", stride=2)
        for j in range(depth):
            block = f"stages.{i}.{j}"
            y = norm(conv(x, f"{block}.dwconv", padding=3, groups=x.shape[1]), f"{block}.norm")
            y = linear(torch.nn.functional.gelu(linear(y, f"{block}.pwconv1")), f"{block}.pwconv2")
            x = x + state[f"{block}.gamma"].view(1, -1, 1, 1) * y
        outputs.append(x)
    return outputs[2], outputs[3], norm(outputs[3].mean(dim=(2, 3)), "norm")
