// vector_math.inl: exp and tanh on one instruction set's vectors.
// Owns: nothing.  Thread-safety: pure functions.
//
// Included after vector_*.inl. Products that a sum follows are written as vfma throughout: where a
// compiler may fuse the two by itself, two instantiations could round differently.

namespace vmalloc {
namespace {

// e^x for x <= 88; 0 below the smallest normal number. Cephes' polynomial, within 1 ulp or so.
inline Vec vexp(Vec x) {
  const Vec smallest = vset(-87.336544F);
  const Vec magic = vset(12582912.0F);    // 1.5 * 2^23: rounds a sum to an integer
  const Vec clamped = vmax(smallest, x);  // a NaN in x stays
  const Vec shifted = vfma(clamped, vset(1.44269504F), magic);
  const Vec n = vsub(shifted, magic);
  Vec r = vfma(n, vset(-0.693359375F), clamped);
  r = vfma(n, vset(2.12194440e-4F), r);
  Vec p = vset(1.9875691500e-4F);
  p = vfma(p, r, vset(1.3981999507e-3F));
  p = vfma(p, r, vset(8.3334519073e-3F));
  p = vfma(p, r, vset(4.1665795894e-2F));
  p = vfma(p, r, vset(1.6666665459e-1F));
  p = vfma(p, r, vset(5.0000001201e-1F));
  const Vec y = vadd(vfma(p, vmul(r, r), r), vset(1.0F));
  return vselect_less(x, smallest, vset(0.0F), vmul(y, vpow2(shifted)));
}

// tanh(x): Cephes' odd polynomial near zero, where the other form cancels.
inline Vec vtanh(Vec x) {
  const Vec magnitude = vabs(x);
  const Vec z = vmul(x, x);
  Vec p = vset(-5.70498872745e-3F);
  p = vfma(p, z, vset(2.06390887954e-2F));
  p = vfma(p, z, vset(-5.37397155531e-2F));
  p = vfma(p, z, vset(1.33314422036e-1F));
  p = vfma(p, z, vset(-3.33332819422e-1F));
  const Vec near_zero = vfma(vmul(p, z), x, x);
  const Vec capped = vmin(vset(10.0F), magnitude);  // tanh(10) rounds to 1
  const Vec e = vexp(vadd(capped, capped));
  const Vec far = vsub(vset(1.0F), vdiv(vset(2.0F), vadd(e, vset(1.0F))));
  return vselect_less(magnitude, vset(0.625F), near_zero, vcopysign(far, x));
}

}  // namespace
}  // namespace vmalloc
