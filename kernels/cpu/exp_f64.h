/* exp and tanh of double. Results below 2^-1022 are 0. */
#ifndef CHUNKED_CE_EXP_F64_H
#define CHUNKED_CE_EXP_F64_H

#include <stdint.h>
#include <string.h>

#define LOWEST_f64 (-708.3)

static inline double as_double(uint64_t bits)
{
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint64_t as_long_bits(double value)
{
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* Return exp(r) = 2^n e^f for r <= 709 or NaN. The series of e^f ends with f^13; the next term is
   4e-18. */
static inline double exp_f64(double r)
{
    const double round = 6755399441055744.0; /* 1.5 2^52 */
    double shifted = r * 1.4426950408889634 + round, n = shifted - round;
    double f = (r - n * 6.93147180369123816490e-1) - n * 1.90821492927058770002e-10;
    double p = 1.0 / 6227020800.0;
    p = p * f + 1.0 / 479001600.0;
    p = p * f + 1.0 / 39916800.0;
    p = p * f + 1.0 / 3628800.0;
    p = p * f + 1.0 / 362880.0;
    p = p * f + 1.0 / 40320.0;
    p = p * f + 1.0 / 5040.0;
    p = p * f + 1.0 / 720.0;
    p = p * f + 1.0 / 120.0;
    p = p * f + 1.0 / 24.0;
    p = p * f + 1.0 / 6.0;
    p = p * f + 0.5;
    p = p * f * f + f + 1.0;
    double e = p * as_double((as_long_bits(shifted) << 52) + (1023ull << 52));
    return r < LOWEST_f64 ? 0.0 : e;
}

static inline double tanh_f64(double y)
{
    double magnitude = as_double(as_long_bits(y) & 0x7fffffffffffffffull), q = y * y;
    double p = (-9.64399179425052238628e-1 * q - 9.92877231001918586564e1) * q
        - 1.61468768441708447952e3;
    double d = ((q + 1.12811678491632931402e2) * q + 2.23548839060100448583e3) * q
        + 4.84406305325125486048e3;
    double small = y + y * q * p / d; /* coefficients from Cephes */
    double e = exp_f64(-2.0 * magnitude), large = (1.0 - e) / (1.0 + e);
    large = as_double(as_long_bits(large) | (as_long_bits(y) & 0x8000000000000000ull));
    return magnitude < 0.625 ? small : large;
}

#endif
