// A device for machines without a GPU. It computes on the CPU, in memory of its own, and refuses tensors of the CPU beside its
// own, as a GPU does. It has no graphs and no streams that run beside one another. An operator without a kernel here moves its
// tensors to the CPU and the answer back.
#include <torch/extension.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/_local_scalar_dense_native.h>
#include <ATen/ops/_indices_native.h>
#include <ATen/ops/_nnz_native.h>
#include <ATen/ops/_sparse_coo_tensor_with_dims_and_tensors_native.h>
#include <ATen/ops/_values_native.h>
#include <ATen/ops/dense_dim_native.h>
#include <ATen/ops/is_coalesced_native.h>
#include <ATen/ops/sparse_dim_native.h>
#include <ATen/autocast_mode.h>
#include <ATen/native/Resize.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/CPUAllocator.h>
#include <set>

namespace {
constexpr auto D = c10::DeviceType::PrivateUse1;
using at::Tensor;

struct Guard final : c10::impl::NoOpDeviceGuardImpl<D> {
  c10::Device exchangeDevice(c10::Device) const override { return c10::Device(D, 0); }
  c10::Device getDevice() const override { return c10::Device(D, 0); }
  c10::Stream s() const { return c10::Stream(c10::Stream::DEFAULT, c10::Device(D, 0)); }
  c10::Stream getStream(c10::Device) const noexcept override { return s(); }
  c10::Stream getDefaultStream(c10::Device) const override { return s(); }
  c10::Stream getNewStream(c10::Device, int) const override { return s(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return s(); }
  void record(void** e, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override { static int x; *e = &x; }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
  double elapsedTime(void*, void*, const c10::DeviceIndex) const override { return 1.0; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Alloc final : c10::Allocator {
  static void del(void* p) { free(p); }
  c10::DataPtr allocate(size_t n) override {
    void* p = n ? aligned_alloc(64, (n + 63) / 64 * 64) : nullptr;
    return {p, p, &del, c10::Device(D, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &del; }
  void copy_data(void* d, const void* s, std::size_t n) const override { memcpy(d, s, n); }
};
Alloc allocator;
REGISTER_ALLOCATOR(D, &allocator);

// Random numbers of the CPU, with which only tensors of this device are drawn.
struct Random final : c10::GeneratorImpl {
  at::Generator of_cpu;
  explicit Random(at::Generator g)
      : c10::GeneratorImpl(c10::Device(D, 0), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)), of_cpu(std::move(g)) {}
  c10::GeneratorImpl* own() const { return of_cpu.unsafeGetGeneratorImpl(); }
  void set_current_seed(uint64_t seed) override { own()->set_current_seed(seed); }
  void set_offset(uint64_t offset) override { own()->set_offset(offset); }
  uint64_t get_offset() const override { return own()->get_offset(); }
  uint64_t current_seed() const override { return own()->current_seed(); }
  uint64_t seed() override { return own()->seed(); }
  void set_state(const c10::TensorImpl& state) override { own()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return own()->get_state(); }
  Random* clone_impl() const override { return new Random(of_cpu.clone()); }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Random>(at::detail::createCPUGenerator()); }
  at::Device getDeviceFromPtr(void*) const override { return at::Device(D, 0); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  void resizePrivateUse1Bytes(const c10::Storage& s, size_t n) const override {
    auto p = allocator.allocate(n);
    memcpy(p.get(), s.data(), std::min(n, s.nbytes()));
    s.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(p));
    s.unsafeGetStorageImpl()->set_nbytes(n);
  }
};

Tensor on_host(const Tensor& t) {  // the same memory, seen as a tensor of the CPU
  auto o = at::TensorOptions().dtype(t.dtype()).device(at::kCPU);
  auto r = at::from_blob(const_cast<void*>(t.const_data_ptr()), t.sizes(), t.strides(), o);
  r._set_conj(t.is_conj());
  r._set_neg(t.is_neg());
  return r;
}
Tensor at_host(const Tensor& t) { return t.device().type() == D ? on_host(t) : t; }

// With STANDIN_WITHOUT_FLOAT64 it has no numbers of double precision, as Apple's GPUs have none.
at::ScalarType allowed(std::optional<at::ScalarType> t) {
  static const bool narrow = std::getenv("STANDIN_WITHOUT_FLOAT64") != nullptr;
  const auto type = c10::dtype_or_default(t);
  TORCH_CHECK_TYPE(!narrow || (type != at::kDouble && type != at::kComplexDouble),
                   "Cannot convert a standin Tensor to float64 dtype as this device doesn't support float64. Use float32.");
  return type;
}
Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> t, std::optional<at::Layout>, std::optional<at::Device>,
             std::optional<bool>, std::optional<at::MemoryFormat> f) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   allowed(t), f);
}
Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> t, std::optional<at::Layout>,
                     std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &allocator,
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), allowed(t));
}
Tensor as_strided(const Tensor& s, c10::SymIntArrayRef a, c10::SymIntArrayRef b, std::optional<c10::SymInt> o) {
  return at::native::as_strided_tensorimpl(s, C10_AS_INTARRAYREF_SLOW(a), C10_AS_INTARRAYREF_SLOW(b),
                                           o ? std::optional<int64_t>(o->expect_int()) : std::nullopt);
}
Tensor view(const Tensor& s, c10::SymIntArrayRef a) { return at::native::view(s, C10_AS_INTARRAYREF_SLOW(a)); }
Tensor reshape_alias(const Tensor& s, c10::SymIntArrayRef a, c10::SymIntArrayRef b) {
  return at::native::_reshape_alias(s, C10_AS_INTARRAYREF_SLOW(a), C10_AS_INTARRAYREF_SLOW(b));
}
Tensor unfold(const Tensor& s, int64_t d, int64_t n, int64_t step) { return at::native::unfold(s, d, n, step); }
const Tensor& resize_(const Tensor& s, c10::SymIntArrayRef a, std::optional<at::MemoryFormat> f) {
  return at::native::resize_(s, C10_AS_INTARRAYREF_SLOW(a), f);
}
Tensor copy_from(const Tensor& s, const Tensor& d, bool) {
  if (d.numel()) at_host(d).copy_(at_host(s));
  return d;
}
Tensor copy_from_and_resize(const Tensor& s, const Tensor& d) {
  if (s.sizes() != d.sizes()) at::native::resize_(d, s.sizes(), std::nullopt);
  return copy_from(s, d, false);
}
at::Scalar scalar(const Tensor& t) { return at::native::_local_scalar_dense_cpu(t); }
Tensor& set_tensor(Tensor& r, const Tensor& s) { return at::native::set_tensor_(r, s); }
Tensor& set_storage(Tensor& r, at::Storage s) { return at::native::set_(r, s); }
Tensor& set_part(Tensor& r, at::Storage s, c10::SymInt o, c10::SymIntArrayRef a, c10::SymIntArrayRef b) {
  return at::cpu::set_(r, s, o.expect_int(), C10_AS_INTARRAYREF_SLOW(a), C10_AS_INTARRAYREF_SLOW(b));
}
Tensor back(const Tensor& t) { return t.defined() ? t.to(c10::Device(D, 0)) : t; }
void same(const Tensor& a, const Tensor& b) {
  TORCH_CHECK(a.device() == b.device(), "Expected all tensors to be on the same device, but found ", a.device(), " and ", b.device());
}
Tensor conv(const Tensor& x, const Tensor& w, const std::optional<Tensor>& b, c10::SymIntArrayRef s, c10::SymIntArrayRef p,
            c10::SymIntArrayRef d, bool tr, c10::SymIntArrayRef op, c10::SymInt g) {
  same(x, w);
  if (b && b->defined()) same(x, *b);
  std::optional<Tensor> hb;
  if (b && b->defined()) hb = on_host(*b);
  return back(at::convolution_symint(on_host(x), on_host(w), hb, s, p, d, tr, op, g));
}
std::tuple<Tensor, Tensor, Tensor> conv_back(const Tensor& gy, const Tensor& x, const Tensor& w, c10::SymIntArrayRef s, c10::SymIntArrayRef p,
                                             c10::SymIntArrayRef d, bool tr, c10::SymIntArrayRef op, c10::SymInt g, std::array<bool, 3> m) {
  auto sizes = c10::SymIntArrayRef(&w.sym_sizes()[tr ? 1 : 0], 1).vec();
  if (tr) sizes[0] = sizes[0] * g;
  auto [a, b, c] = at::convolution_backward_symint(on_host(gy.contiguous()), on_host(x), on_host(w), c10::OptionalArrayRef<c10::SymInt>(sizes), s, p, d, tr, op, g, m);
  return {back(a), back(b), back(c)};
}
// Its running mean and variance are written in place, which the operator's schema does not say.
std::tuple<Tensor, Tensor, Tensor> batch_norm(const Tensor& x, const std::optional<Tensor>& w, const std::optional<Tensor>& b,
                                              const std::optional<Tensor>& mean, const std::optional<Tensor>& var, bool training,
                                              double momentum, double eps) {
  auto host = [&](const std::optional<Tensor>& t) -> std::optional<Tensor> {
    if (!t || !t->defined()) return std::nullopt;
    same(x, *t);
    return on_host(*t);
  };
  auto [y, m, v] = at::native_batch_norm(on_host(x), host(w), host(b), host(mean), host(var), training, momentum, eps);
  return {back(y), back(m), back(v)};
}
// 0: attention by its formula, in plain operators
int64_t sdp(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool, std::optional<double>, bool) { return 0; }

void require_one_device(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  bool here = false, on_cpu = false;
  auto look = [&](const Tensor& t) {
    here |= t.defined() && t.device().type() == D;
    on_cpu |= t.defined() && t.device().is_cpu() && t.dim() > 0;  // a single number may lie anywhere
  };
  for (const auto& v : torch::jit::last(stack, op.schema().arguments().size())) {
    if (v.isTensor()) look(v.toTensor());
    if (v.isTensorList())
      for (const Tensor& t : v.toTensorVector()) look(t);
  }
  static const std::set<std::string> by_index = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"};
  const auto& name = op.schema().name();
  const bool indexing = by_index.count(name);  // x[indices]: these may lie on the CPU
  TORCH_CHECK(!here || !on_cpu || indexing, "Expected all tensors to be on the same device, but found standin:0 and cpu (", name, ")");
}
void take_generator_of_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const size_t first = stack->size() - op.schema().arguments().size();
  bool on_cpu = false;
  for (size_t i = first; i < stack->size(); i++) on_cpu |= (*stack)[i].isTensor() && (*stack)[i].toTensor().is_cpu();
  for (size_t i = first; i < stack->size(); i++) {
    if (!(*stack)[i].isGenerator()) continue;
    const at::Generator given = (*stack)[i].toGenerator();
    if (!given.defined()) continue;
    const auto wanted = on_cpu ? at::kCPU : D;
    TORCH_CHECK(given.device().type() == wanted, "Expected a '", wanted, "' device type for generator but found '", given.device().type(), "'");
    if (!on_cpu) (*stack)[i] = static_cast<Random*>(given.unsafeGetGeneratorImpl())->of_cpu;
  }
}
void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  require_one_device(op, *stack);
  take_generator_of_cpu(op, stack);
  at::native::cpu_fallback(op, stack);
}
}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("unfold", unfold);
  m.impl("resize_", resize_);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", scalar);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("set_.source_Storage", set_storage);
  m.impl("set_.source_Storage_storage_offset", set_part);
  m.impl("convolution_overrideable", conv);
  m.impl("convolution_backward_overrideable",
         [](const Tensor& gy, const Tensor& x, const Tensor& w, c10::SymIntArrayRef s, c10::SymIntArrayRef p, c10::SymIntArrayRef d, bool tr,
            c10::SymIntArrayRef op, c10::SymInt g, std::array<bool, 3> k) { return conv_back(gy, x, w, s, p, d, tr, op, g, k); });
  m.impl("native_batch_norm", batch_norm);
  m.impl("_fused_sdp_choice", sdp);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>()); }
TORCH_LIBRARY_IMPL(aten, SparsePrivateUse1, m) {
  m.impl("_sparse_coo_tensor_with_dims_and_tensors", at::native::new_with_dims_and_tensor_sparse_symint);
  m.impl("_nnz", at::native::_nnz_sparse);
  m.impl("_indices", at::native::_indices_sparse);
  m.impl("_values", at::native::_values_sparse);
  m.impl("sparse_dim", at::native::sparse_dim_sparse);
  m.impl("dense_dim", at::native::dense_dim_sparse);
  m.impl("is_coalesced", at::native::is_coalesced_sparse);
}
#define IN_HALF(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define IN_FLOAT(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  AT_FORALL_LOWER_PRECISION_FP(IN_HALF)
  AT_FORALL_FP32(IN_FLOAT)
}
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
}
