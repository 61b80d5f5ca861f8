/* What PyTorch asks of a CUDA device behind Python's back, for a machine that has none: there is one device, whose streams and
 * events are always done, and whose random numbers are the CPU's. It must be loaded before libtorch asks for the first time. */
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace at {
struct CUDAHooks : CUDAHooksInterface {
    CUDAHooks(CUDAHooksArgs) {}
    void init() const override {}
    bool hasCUDA() const override { return true; }
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    bool hasPrimaryContext(DeviceIndex) const override { return true; }
    DeviceIndex deviceCount() const override { return 1; }
    DeviceIndex getCurrentDevice() const override { return 0; }
    void setCurrentDevice(DeviceIndex) const override {}
    DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
    DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
    const Generator &getDefaultGenerator(DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
    Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(); }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at

using c10::Device, c10::DeviceIndex, c10::DeviceType, c10::Stream;

struct WoodenGuard : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
    static Stream only() { return Stream(Stream::DEFAULT, Device(DeviceType::CUDA, 0)); }
    DeviceIndex deviceCount() const noexcept override { return 1; }
    Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
    Device exchangeDevice(Device) const override { return getDevice(); }
    Stream getStream(Device) const noexcept override { return only(); }
    Stream getDefaultStream(Device) const override { return only(); }
    Stream exchangeStream(Stream) const noexcept override { return only(); }
    void record(void **, const Stream &, const DeviceIndex, const c10::EventFlag) const override {}
    void block(void *, const Stream &) const override {}
    bool queryEvent(void *) const override { return true; }
    bool queryStream(const Stream &) const override { return true; }
    void synchronizeStream(const Stream &) const override {}
    void destroyEvent(void *, const DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, WoodenGuard)
