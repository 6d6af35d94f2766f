//! A browser for one test.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use axum::body::Bytes;
use axum::http::{Request, Response};
use serde_json::{Value, json};
use thirtyfour::common::config::WebDriverConfig;
use thirtyfour::error::WebDriverError;
use thirtyfour::extensions::cdp::ChromeDevTools;
use thirtyfour::session::http::{Body, HttpClient};
use thirtyfour::{By, ChromiumLikeCapabilities, DesiredCapabilities, WebDriver, WebElement};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::driver::Driver;
use crate::support::{PATIENCE, eventually};

/// Browsers at a time: each is some processes and some hundred megabytes.
static TURNS: Semaphore = Semaphore::const_new(2);

/// Between two looks: each costs a browser, or a run of the program, some milliseconds of what others need.
const LOOK: Duration = Duration::from_millis(50);

/// Waits until this holds, with fewer looks than [`eventually`].
pub fn patiently(what: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    eventually(what, || {
        let holds = condition()?;
        if !holds {
            thread::sleep(LOOK);
        }
        Ok(holds)
    })
}

/// The way to chromedriver. It blocks: nothing else runs in the runtime of a browser.
struct Wire(ureq::Agent);

impl Wire {
    fn new() -> Self {
        Self(ureq::Agent::config_builder().http_status_as_error(false).timeout_global(Some(PATIENCE)).build().into())
    }
}

#[async_trait::async_trait]
impl HttpClient for Wire {
    async fn send(&self, request: Request<Body<'_>>) -> Result<Response<Bytes>, WebDriverError> {
        let (parts, body) = request.into_parts();
        let answer = match body {
            Body::Empty => self.0.run(Request::from_parts(parts, ())),
            Body::Json(json) => self.0.run(Request::from_parts(parts, json.to_string())),
        };
        let read = answer.and_then(|answer| {
            let (parts, mut body) = answer.into_parts();
            Ok(Response::from_parts(parts, Bytes::from(body.read_to_vec()?)))
        });
        read.map_err(|error| WebDriverError::HttpError(error.to_string()))
    }

    async fn new(&self) -> std::sync::Arc<dyn HttpClient> {
        std::sync::Arc::new(Self::new())
    }
}

/// A window of its own browser with a profile of its own. It ends with the value, also of a test that failed.
pub struct Browser {
    runtime: Runtime,
    driver: Option<WebDriver>,
    /// Where paths begin.
    site: String,
    _turn: SemaphorePermit<'static>,
}

impl Browser {
    /// A browser for this site, 1280 px wide; `None` where there is none, which is said.
    pub fn start(site: &str) -> Result<Option<Self>> {
        let Some(chromedriver) = Driver::shared()? else {
            println!(
                "there is no chromedriver: the console is not tested in a browser; Debian has it in the packages chromium and chromium-driver, and scripts/install-servers.sh --tests installs them"
            );
            return Ok(None);
        };
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let turn = runtime.block_on(TURNS.acquire())?;
        let mut wanted = DesiredCapabilities::chrome();
        // The sandbox needs what root and containers do not have; the pages are our own.
        for argument in ["--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--no-sandbox", "--hide-scrollbars"] {
            wanted.add_arg(argument)?;
        }
        let session = WebDriver::new_with_config_and_client(&chromedriver.url, wanted, WebDriverConfig::default(), Wire::new());
        let driver = Some(runtime.block_on(session)?);
        let browser = Self { runtime, driver, site: site.to_owned(), _turn: turn };
        browser.resize(1280, 900)?;
        Ok(Some(browser))
    }

    fn driver(&self) -> Result<&WebDriver> {
        self.driver.as_ref().context("it is running")
    }

    pub fn devtools(&self, command: &str, parameters: Value) -> Result<Value> {
        let devtools = ChromeDevTools::new(self.driver()?.handle.clone());
        Ok(self.runtime.block_on(devtools.execute_cdp_with_params(command, parameters))?)
    }

    /// The size of what a page has to itself.
    pub fn resize(&self, width: u32, height: u32) -> Result<()> {
        let metrics = json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": false });
        self.devtools("Emulation.setDeviceMetricsOverride", metrics).map(drop)
    }

    pub fn open(&self, path: &str) -> Result<()> {
        Ok(self.runtime.block_on(self.driver()?.goto(format!("{}{path}", self.site)))?)
    }

    /// What a function's body returns in the page.
    pub fn script(&self, body: &str) -> Result<Value> {
        let ran = self.runtime.block_on(self.driver()?.execute(body, Vec::new()));
        Ok(ran.with_context(|| body.to_owned())?.json().clone())
    }

    /// What a function's body promises in the page.
    pub fn promise(&self, body: &str) -> Result<Value> {
        let body = format!("const done = arguments[0]; (async () => {{ {body} }})().then(done, (error) => done(String(error)));");
        let ran = self.runtime.block_on(self.driver()?.execute_async(body.as_str(), Vec::new()));
        Ok(ran.with_context(|| body.clone())?.json().clone())
    }

    /// Waits until this expression is true in the page.
    pub fn until(&self, what: &str, expression: &str) -> Result<()> {
        let holds = || Ok(self.script(&format!("return Boolean({expression});"))? == true);
        patiently(what, holds).with_context(|| self.page().unwrap_or_default())
    }

    /// The address and the text of the page, for messages.
    pub fn page(&self) -> Result<String> {
        let page = self.script("return location.pathname + location.search + '\\n' + document.body.innerText;")?;
        Ok(page.as_str().unwrap_or_default().to_owned())
    }

    /// Waits for the element.
    fn find(&self, css: &str) -> Result<WebElement> {
        let mut found = None;
        let look = || {
            found = self.all(css)?.into_iter().next();
            Ok(found.is_some())
        };
        patiently(css, look).with_context(|| self.page().unwrap_or_default())?;
        found.context("it was found")
    }

    fn all(&self, css: &str) -> Result<Vec<WebElement>> {
        Ok(self.runtime.block_on(self.driver()?.find_all(By::Css(css)))?)
    }

    pub fn count(&self, css: &str) -> Result<usize> {
        Ok(self.all(css)?.len())
    }

    /// As it is shown.
    pub fn text(&self, css: &str) -> Result<String> {
        let element = self.find(css)?;
        Ok(self.runtime.block_on(element.text())?)
    }

    /// As a person clicks: only what is shown and not covered.
    pub fn click(&self, css: &str) -> Result<()> {
        let element = self.find(css)?;
        self.runtime.block_on(element.click()).with_context(|| format!("click {css} in {}", self.page().unwrap_or_default()))
    }

    pub fn fill(&self, css: &str, text: &str) -> Result<()> {
        let element = self.find(css)?;
        self.runtime.block_on(async {
            element.clear().await?;
            element.send_keys(text).await
        })?;
        Ok(())
    }

    /// Presses keys, wherever the focus is.
    pub fn press(&self, keys: &str) -> Result<()> {
        let chain = self.driver()?.action_chain().send_keys(keys);
        Ok(self.runtime.block_on(chain.perform())?)
    }

    /// A PNG of the page from its top, at most so high.
    pub fn picture(&self, height: u32) -> Result<Vec<u8>> {
        let width = u32::try_from(self.script("return innerWidth;")?.as_u64().context("a width")?)?;
        self.resize(width, 300)?;
        let full = self.script("return document.documentElement.scrollHeight;")?.as_u64().context("a height")?;
        self.resize(width, u32::try_from(full)?.min(height))?;
        let picture = self.runtime.block_on(self.driver()?.screenshot_as_png())?;
        Ok(picture)
    }

    /// Fails with the page's text where it does not contain this.
    pub fn says(&self, text: &str) -> Result<()> {
        let page = self.page()?;
        if !page.contains(text) {
            bail!("{text:?} is not in {page}");
        }
        Ok(())
    }
}

impl Drop for Browser {
    /// The guard of chromedriver ends a browser that does not end by itself.
    fn drop(&mut self) {
        let Some(driver) = self.driver.take() else { return };
        let quit = async { tokio::time::timeout(Duration::from_secs(10), driver.quit()).await };
        match self.runtime.block_on(quit) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => eprintln!("a browser did not end: {error}"),
            Err(_) => eprintln!("a browser did not end in time"),
        }
    }
}
