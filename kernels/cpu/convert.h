/* Conversions of half precision with integer operations that every instruction set has. */
#ifndef CHUNKED_CE_CONVERT_H
#define CHUNKED_CE_CONVERT_H

#include <stdint.h>
#include <string.h>

static inline float as_float(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t as_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float from_bfloat16(uint16_t half)
{
    return as_float((uint32_t)half << 16);
}

/* Round to nearest, ties to even. A NaN stays a NaN. */
static inline uint16_t to_bfloat16(float value)
{
    uint32_t bits = as_bits(value);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    uint32_t nan = (bits >> 16) | 0x40u;
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

static inline float from_float16(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16, rest = (uint32_t)(half & 0x7fffu) << 13;
    uint32_t normal = rest + (112u << 23);
    uint32_t subnormal = as_bits(as_float(rest + (113u << 23)) - as_float(113u << 23));
    uint32_t bits = rest < 0x00800000u ? subnormal : normal;
    bits = rest >= 0x0f800000u ? rest + (224u << 23) : bits; /* inf, NaN */
    return as_float(sign | bits);
}

static inline uint16_t to_float16(float value)
{
    uint32_t bits = as_bits(value), sign = (bits >> 16) & 0x8000u;
    bits &= 0x7fffffffu;
    uint32_t normal = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
    /* the last bit of 0.5 is the smallest subnormal, so the sum rounds correctly */
    uint32_t subnormal = as_bits(as_float(bits) + 0.5f) - 0x3f000000u;
    uint32_t half = bits < (113u << 23) ? subnormal : normal;
    half = bits >= (143u << 23) ? 0x7c00u : half; /* from 65520 on; below, rounding carries over */
    half = bits > 0x7f800000u ? 0x7e00u : half;
    return (uint16_t)(sign | half);
}

#endif
