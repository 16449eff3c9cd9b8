/* exp and tanh of float, to about one unit in the last place. Results below 2^-126 are 0. */
#ifndef CHUNKED_CE_EXP_F32_H
#define CHUNKED_CE_EXP_F32_H

#include "convert.h"

#define LOWEST_f32 (-87.3f)

/* Return exp(r) = 2^n e^f for r <= 88 or NaN. ln 2 has two parts (Cody and Waite), and e^f is a
   minimax polynomial with a relative error of 3e-9. */
static inline float exp_f32(float r)
{
    const float round = 12582912.0f; /* 1.5 2^23: its sums hold an integer in the last bits */
    float shifted = r * 1.44269504f + round, n = shifted - round;
    float f = (r - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 1.381461858e-03f;
    p = p * f + 8.368713781e-03f;
    p = p * f + 4.166838899e-02f;
    p = p * f + 1.666652113e-01f;
    p = p * f + 4.999999404e-01f;
    p = p * f + 1.0f;
    p = p * f + 1.0f;
    float e = p * as_float((as_bits(shifted) << 23) + (127u << 23));
    return r < LOWEST_f32 ? 0.0f : e; /* false for a NaN, which stays a NaN */
}

static inline float tanh_f32(float y)
{
    float magnitude = as_float(as_bits(y) & 0x7fffffffu), q = y * y;
    float p = -5.70498872745e-3f;
    p = p * q + 2.06390887954e-2f;
    p = p * q - 5.37397155531e-2f;
    p = p * q + 1.33314422036e-1f;
    p = p * q - 3.33332819422e-1f;
    p = p * q * y + y;
    float e = exp_f32(-2.0f * magnitude), large = (1.0f - e) / (1.0f + e);
    large = as_float(as_bits(large) | (as_bits(y) & 0x80000000u));
    return magnitude < 0.625f ? p : large;
}

#endif
