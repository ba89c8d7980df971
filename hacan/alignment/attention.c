/* The hybrid form's attention between its matrix products (METHOD section 2): what hybrid.py does in a dozen passes
 * over a block is done here pair by pair, while the pair is in the innermost cache. float32, no gradients; fused.py
 * calls it.
 *
 * dots are [T, N, R]: the tokens of all captions, N images of R regions; caption c has the tokens starts[c] to
 * starts[c + 1]. With a = LeakyReLU_0.1(dots), for queries q and sources s:
 *
 *     b_sq = a_sq / (||a_s.|| + 1e-8),   e_qs = exp(lambda (b_sq - max_s b_sq)), of KSF 0 where s is not kept,
 *     score = mean over q of sum_s e_qs dots_qs / max(||sum_s e_qs s||, 1e-8 sum_s e_qs) / ||q||
 */

#include <math.h>
#include <omp.h>
#include <stdint.h>

enum { WHOLE, PROB, EQUAL }; /* focal: LRG's attention is whole; the two kinds of KSF */
enum { LANES = 16 };         /* regions whose quadratic forms are summed in registers */

static const float EPS = 1.1920929e-7f;

static inline float leaky(float x) { return x > 0 ? x : 0.1f * x; }

static inline float larger(float x, float y) { return x > y ? x : y; } /* y if one of them is NaN */

/* exp of x <= 0, to 2 units in the last place; of 0 it is 1 exactly, and what is below -87 counts as -87. Products and
 * sums are left for the compiler to fuse: fmaf would be a call where the processor cannot. */
static inline float exponential(float x)
{
    x = x < -87.0f ? -87.0f : x;
    float n = rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f; /* x - n log 2, in two parts: the first product is exact */
    float p = 1.0f / 5040;                               /* Taylor: |r| <= log 2 / 2 */
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    union { uint32_t bits; float value; } power = {(uint32_t)((int32_t)n + 127) << 23}; /* 2^n */
    return p * power.value;
}

/* A source is kept where its weight is above this, given sum e, sum e^0.5 and sum e^1.5 of n sources. hybrid.py says
 * why it is lowered by some rounding errors. The largest e is 1 and always kept: a sum of smaller terms is no larger,
 * rounded or not, so sum e <= n and sum e^1.5 <= sum e^0.5. */
static inline float bar(int focal, float n, float weights, float roots, float cubes)
{
    return (focal == PROB ? cubes / roots : weights / n) * (1 - 8 * EPS);
}

/* i2t of one pair. e: [words, width], sums: [4, width]; width is `regions` rounded up to LANES. */
static float regions_ask(const float *dots, int64_t stride, int64_t words, int64_t regions, int64_t width,
                         float temperature, int focal, const float *gram, int64_t gram_stride,
                         const float *inverse_norms, float *e, float *sums)
{
    float *top = sums, *total = sums + width, *roots = sums + 2 * width, *along = sums + 3 * width;
    for (int64_t r = 0; r < regions; r++) top[r] = -INFINITY;
    for (int64_t s = 0; s < words; s++) {
        const float *ds = dots + s * stride;
        float *es = e + s * width, norm = 0;
#pragma omp simd reduction(+ : norm)
        for (int64_t r = 0; r < regions; r++) norm += leaky(ds[r]) * leaky(ds[r]);
        norm = sqrtf(norm) + 1e-8f;
        for (int64_t r = 0; r < regions; r++) {
            es[r] = leaky(ds[r]) / norm * temperature; /* divided: with a single query this is lambda, exactly */
            top[r] = larger(top[r], es[r]);
        }
    }
    for (int64_t r = 0; r < regions; r++) total[r] = roots[r] = along[r] = 0;
    for (int64_t s = 0; s < words; s++) {
        float *es = e + s * width;
        for (int64_t r = 0; r < regions; r++) es[r] = exponential(es[r] - top[r]);
    }
    if (focal != WHOLE) {
        float *cubes = along;
        for (int64_t s = 0; s < words; s++) {
            const float *es = e + s * width;
            for (int64_t r = 0; r < regions; r++) {
                float root = sqrtf(es[r]);
                total[r] += es[r];
                roots[r] += root;
                cubes[r] += es[r] * root;
            }
        }
        for (int64_t r = 0; r < regions; r++) {
            top[r] = bar(focal, words, total[r], roots[r], cubes[r]);
            total[r] = along[r] = 0;
        }
        for (int64_t s = 0; s < words; s++) {
            float *es = e + s * width;
            for (int64_t r = 0; r < regions; r++) es[r] *= es[r] > top[r];
        }
    }
    for (int64_t s = 0; s < words; s++) {
        const float *es = e + s * width, *ds = dots + s * stride;
        for (int64_t r = 0; r < regions; r++) {
            total[r] += es[r];
            along[r] += es[r] * ds[r];
        }
    }
    float score = 0;
    for (int64_t first = 0; first < regions; first += LANES) {
        float square[LANES] = {0}; /* e G e, G symmetric */
        for (int64_t s = 0; s < words; s++) {
            const float *g = gram + s * gram_stride, *own = e + s * width + first;
            float half[LANES] = {0};
            for (int64_t k = 0; k < s; k++)
                for (int64_t r = 0; r < LANES; r++) half[r] += g[k] * e[k * width + first + r];
            for (int64_t r = 0; r < LANES; r++) square[r] += own[r] * (2 * half[r] + g[s] * own[r]);
        }
        int64_t lanes = regions - first < LANES ? regions - first : LANES; /* the others hold nothing of use */
        for (int64_t r = 0; r < lanes; r++) {
            float least = 1e-8f * total[first + r];
            score += along[first + r] / sqrtf(larger(least * least, square[r])) * inverse_norms[first + r];
        }
    }
    return score / regions;
}

/* t2i of one pair as far as it goes without the regions' Gram matrix: e, whose rows are `stride` apart as those of
 * dots are, and for each word, `images` apart, sum e dots and (1e-8 sum e)^2. norms: [regions], overwritten. */
static void words_ask(const float *dots, int64_t stride, int64_t words, int64_t regions, float temperature, int focal,
                      float *e, float *along, float *floors, int64_t images, float *norms)
{
    for (int64_t r = 0; r < regions; r++) norms[r] = 0;
    for (int64_t q = 0; q < words; q++) {
        const float *dq = dots + q * stride;
        for (int64_t r = 0; r < regions; r++) norms[r] += leaky(dq[r]) * leaky(dq[r]);
    }
    for (int64_t r = 0; r < regions; r++) norms[r] = sqrtf(norms[r]) + 1e-8f;
    for (int64_t q = 0; q < words; q++) {
        const float *dq = dots + q * stride;
        float *eq = e + q * stride, top = -INFINITY, total = 0, product = 0;
#pragma omp simd reduction(max : top)
        for (int64_t r = 0; r < regions; r++) {
            eq[r] = leaky(dq[r]) / norms[r] * temperature;
            top = larger(top, eq[r]);
        }
        for (int64_t r = 0; r < regions; r++) eq[r] = exponential(eq[r] - top);
        if (focal != WHOLE) {
            float weights = 0, roots = 0, cubes = 0;
#pragma omp simd reduction(+ : weights, roots, cubes)
            for (int64_t r = 0; r < regions; r++) {
                float root = sqrtf(eq[r]);
                weights += eq[r];
                roots += root;
                cubes += eq[r] * root;
            }
            float least = bar(focal, regions, weights, roots, cubes);
            for (int64_t r = 0; r < regions; r++) eq[r] *= eq[r] > least;
        }
#pragma omp simd reduction(+ : total, product)
        for (int64_t r = 0; r < regions; r++) {
            total += eq[r];
            product += eq[r] * dq[r];
        }
        along[q * images] = product;
        floors[q * images] = 1e-8f * total * (1e-8f * total);
    }
}

static int64_t padded(int64_t regions) { return (regions + LANES - 1) / LANES * LANES; }

/* Numbers of work that score_i2t needs for each thread; longest: tokens of the longest caption. */
int64_t work_i2t(int64_t longest, int64_t regions) { return (longest + 4) * padded(regions); }

/* i2t scores [captions, images]. grams: of each caption's tokens, rows gram_strides apart; inverse_norms: of the
 * regions [images, regions] that a caption meets, norm_stride further on for the next; work: [threads, work_i2t]. */
void score_i2t(const float *dots, int64_t captions, int64_t images, int64_t regions, const int64_t *starts,
               float temperature, int focal, const float *const *grams, const int64_t *gram_strides,
               const float *inverse_norms, int64_t norm_stride, float *scores, float *work, int64_t longest,
               int threads)
{
    int64_t width = padded(regions), stride = images * regions;
#pragma omp parallel for collapse(2) schedule(dynamic, 8) num_threads(threads)
    for (int64_t c = 0; c < captions; c++)
        for (int64_t n = 0; n < images; n++) {
            const float *d = dots + starts[c] * stride + n * regions, *inverse = inverse_norms + c * norm_stride;
            float *e = work + omp_get_thread_num() * work_i2t(longest, regions);
            scores[c * images + n] =
                regions_ask(d, stride, starts[c + 1] - starts[c], regions, width, temperature, focal, grams[c],
                            gram_strides[c], inverse + n * regions, e, e + longest * width);
        }
}

/* Weights e [T, N, R] of t2i, and for each word and image sum e dots and (1e-8 sum e)^2, [T, N]. work: [threads, R]. */
void weigh_t2i(const float *dots, int64_t captions, int64_t images, int64_t regions, const int64_t *starts,
               float temperature, int focal, float *e, float *along, float *floors, float *work, int threads)
{
    int64_t stride = images * regions;
#pragma omp parallel for collapse(2) schedule(dynamic, 8) num_threads(threads)
    for (int64_t c = 0; c < captions; c++)
        for (int64_t n = 0; n < images; n++) {
            int64_t first = starts[c] * stride + n * regions, word = starts[c] * images + n;
            words_ask(dots + first, stride, starts[c + 1] - starts[c], regions, temperature, focal, e + first,
                      along + word, floors + word, images, work + omp_get_thread_num() * regions);
        }
}

/* t2i scores [captions, images] of what weigh_t2i wrote, half = e G (token and image strides) and 1 / ||t|| [T]. */
void score_t2i(const float *e, const float *half, int64_t half_token, int64_t half_image, const float *along,
               const float *floors, const float *inverse_norms, int64_t captions, int64_t images, int64_t regions,
               const int64_t *starts, float *scores, int threads)
{
#pragma omp parallel for collapse(2) schedule(dynamic, 8) num_threads(threads)
    for (int64_t c = 0; c < captions; c++)
        for (int64_t n = 0; n < images; n++) {
            float score = 0;
            for (int64_t t = starts[c]; t < starts[c + 1]; t++) {
                int64_t word = t * images + n;
                const float *et = e + word * regions, *ht = half + t * half_token + n * half_image;
                float square = 0;
#pragma omp simd reduction(+ : square)
                for (int64_t r = 0; r < regions; r++) square += et[r] * ht[r];
                score += along[word] / sqrtf(larger(floors[word], square)) * inverse_norms[t];
            }
            scores[c * images + n] = score / (starts[c + 1] - starts[c]);
        }
}
